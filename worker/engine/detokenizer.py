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

    def flush(self) -> str:
        """What an unfinished character at the end is shown as."""
        return self._decoder.decode(b"", final=True)


class StopStrings:
    """Passes on a growing text up to the first stop string, which may arrive in pieces and is never shown."""

    def __init__(self, stop: Sequence[str]) -> None:
        self.is_hit = False
        self._stop = tuple(stop)
        self._held = ""

    def push(self, piece: str) -> str:
        """The text that may be shown now: all but a tail that can still become a stop string."""
        if not self._stop:
            return piece
        text = self._held + piece
        hits = [at for at in map(text.find, self._stop) if at >= 0]
        if hits:
            self.is_hit = True
            self._held = ""
            return text[: min(hits)]
        cut = len(text) - max(_overlap(text, stop) for stop in self._stop)
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """The text that was held back and is now known to be no stop string."""
        held, self._held = self._held, ""
        return held


def _bytes_of(token: str, letters: Mapping[str, int]) -> bytes:
    """`letters` stand for a byte each in a byte-level vocabulary."""
    if all(letter in letters for letter in token):
        return bytes(letters[letter] for letter in token)
    return token.encode()


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with, the whole of `stop` excepted."""
    lengths = range(min(len(stop) - 1, len(text)), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)
