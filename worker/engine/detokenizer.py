"""Token ids to the text a reader sees: whole characters, and nothing from a stop string on. Touches no tensors.

For byte-level vocabularies such as Qwen2's.
"""

import codecs
from collections.abc import Mapping, Sequence
from typing import Any


class TokenBytes:
    """What each token id stands for in bytes; special tokens and ids without a token stand for none."""

    def __init__(self, tokenizer: Any) -> None:
        # Imported here because it is heavy: all else in this file has no use for it.
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
        special = set(tokenizer.all_special_ids)
        self._bytes = [
            b"" if token_id in special or token is None else _bytes_of(token, letters)
            for token_id, token in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
        ]

    def __getitem__(self, token_id: int) -> bytes:
        # A model's output layer may be wider than its tokenizer.
        return self._bytes[token_id] if token_id < len(self._bytes) else b""


class Detokenizer:
    """The text of one sequence, as `tokenizer.decode(..., skip_special_tokens=True)` gives it for the whole."""

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._token_bytes = token_bytes
        # Bytes that make no character become U+FFFD, as in the tokenizer.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The characters that this token completes."""
        return self._decoder.decode(self._token_bytes[token_id])

    def goes_on(self, token_id: int) -> bool:
        """Whether this token continues a character that is begun."""
        begun, _ = self._decoder.getstate()
        # UTF-8: all but the first byte of a character are from 0x80 to 0xbf.
        return bool(begun) and b"\x80" <= self._token_bytes[token_id][:1] < b"\xc0"

    def flush(self) -> str:
        """What an unfinished character at the end is shown as."""
        return self._decoder.decode(b"", final=True)


class StopStrings:
    """Passes on a growing text up to the first stop string, which may arrive in pieces and is never shown.

    Each character costs the same, however long the stop strings are and however often it begins like one.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self.is_hit = False
        self._stops = [_StopString(text) for text in stop]
        # As many characters as the longest match has so far.
        self._held: list[str] = []
        self._num_held = 0

    def push(self, piece: str, may_stop: bool = True) -> str:
        """The text that may be shown now: all but a tail that can still become a stop string.

        One that is complete while nothing `may_stop` is text as any other.
        """
        if not self._stops:
            return piece
        starts = [start for stop in self._stops if (start := stop.push(piece, may_stop)) is not None]
        self._held.append(piece)
        num_shown = self._num_held + len(piece)
        if starts:
            self.is_hit = True
            num_shown, self._num_held = self._num_held + min(starts), 0
        else:
            self._num_held = max(stop.num_matched for stop in self._stops)
            num_shown -= self._num_held
        if not num_shown and not self.is_hit:
            return ""
        text = "".join(self._held)
        self._held = [] if self.is_hit else [text[num_shown:]]
        return text[:num_shown]

    def flush(self) -> str:
        """The text that was held back and is now known to be no stop string."""
        held = "".join(self._held)
        self._held, self._num_held = [], 0
        return held


class _StopString:
    """How much of it the end of the text is (Knuth, Morris and Pratt)."""

    def __init__(self, text: str) -> None:
        self.num_matched = 0
        self._text = text
        # Of each beginning, as far as one was matched: how much of its own end it begins with.
        self._borders = [0, 0]

    def push(self, piece: str, may_stop: bool) -> int | None:
        """Where it begins in the piece, or how far before it, once it is whole and `may_stop`."""
        for index, letter in enumerate(piece, 1):
            while self.num_matched and self._text[self.num_matched] != letter:
                self.num_matched = self._border(self.num_matched)
            self.num_matched += self._text[self.num_matched] == letter
            if self.num_matched == len(self._text):
                if may_stop:
                    return index - len(self._text)
                self.num_matched = self._border(self.num_matched)
        return None

    def _border(self, length: int) -> int:
        text, borders = self._text, self._borders
        for end in range(len(borders), length + 1):
            border = borders[-1]
            while border and text[border] != text[end - 1]:
                border = borders[border]
            borders.append(border + (text[border] == text[end - 1]))
        return borders[length]


def _bytes_of(token: str, letters: Mapping[str, int]) -> bytes:
    """`letters` stand for a byte each in a byte-level vocabulary."""
    if all(letter in letters for letter in token):
        return bytes(letters[letter] for letter in token)
    return token.encode()
