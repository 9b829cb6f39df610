"""Chat messages to token ids: the checkpoint's own template, the thinking suffix, and placeholders filled in."""

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from transformers import Qwen2Tokenizer

from keye.worker.model.checkpoint import IMAGE_PAD, load_chat_template
from keye.worker.model.positions import PlaceholderMismatch

Thinking = Literal["auto", "think", "no_think"]
Message = dict[str, Any]

VIDEO_PAD = "<|video_pad|>"
# What 1.5 writes around the pads of a frame. Its tokenizer need not flag them special; users may not forge them.
FRAME, FAST_START, FAST_END = "<|frame|>", "<|fast_start|>", "<|fast_end|>"

# Put where the text of a user must not join up to a control token; a code point that Unicode keeps out of texts. A
# user's own are left out: a million of them would be a million texts to encode.
_CUT = "\ufdd0"


class PromptFormat:
    """How one checkpoint writes a conversation."""

    def __init__(self, tokenizer: Qwen2Tokenizer, chat_template: str) -> None:
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        control = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        control |= {FRAME, FAST_START, FAST_END} & tokenizer.get_vocab().keys()
        self._control = re.compile("|".join(map(re.escape, sorted(control))))

    @classmethod
    def from_checkpoint(cls, path: Path | str) -> "PromptFormat":
        return cls(Qwen2Tokenizer.from_pretrained(path), load_chat_template(path))

    def render(self, messages: Sequence[Message], thinking: Thinking = "auto") -> str:
        """The conversation as text, one placeholder an image or video, the assistant's turn begun.

        Control tokens that users wrote are cut in two, so that `encode` reads them as the plain text they are.
        """
        conversation = [self._plain(message) for message in messages]
        if thinking != "auto":
            _append_to_last_user_text(conversation, f"/{thinking}")
        text = self.tokenizer.apply_chat_template(
            conversation, chat_template=self.chat_template, add_generation_prompt=True, tokenize=False
        )
        assert isinstance(text, str)
        return text

    def encode(self, text: str) -> list[int]:
        parts = text.split(_CUT)
        # Each once: a control token written a hundred thousand times makes as many parts, and few different ones.
        different = list(dict.fromkeys(parts))
        encoded = self.tokenizer(different, add_special_tokens=False, verbose=False)["input_ids"]
        ids = dict(zip(different, encoded, strict=True))
        return [token_id for part in parts for token_id in ids[part]]

    def _plain(self, message: Message) -> Message:
        """A copy with all text made plain. Neighbouring texts are joined first: two could hold half a token each."""
        content = message["content"]
        if isinstance(content, str):
            return {**message, "content": self._cut(content)}
        parts: list[dict[str, Any]] = []
        for is_text, neighbours in groupby(content, _is_text):
            if is_text:
                first, *others = neighbours
                text = "".join([first["text"], *(part["text"] for part in others)])
                parts.append({**first, "text": self._cut(text)})
            else:
                parts += neighbours
        return {**message, "content": parts}

    def _cut(self, text: str) -> str:
        return self._control.sub(lambda token: token[0][0] + _CUT + token[0][1:], text.replace(_CUT, ""))


def fill_placeholders(text: str, images: Sequence[str], videos: Sequence[str]) -> str:
    """Replaces each placeholder by the text that stands for its image or video, in order.

    Raises `PlaceholderMismatch` when there are more or fewer placeholders than images or videos.
    """
    fillers: dict[str, Iterator[str]] = {}
    for pad, given, name in ((IMAGE_PAD, images, "image"), (VIDEO_PAD, videos, "video")):
        if (asked := text.count(pad)) != len(given):
            raise PlaceholderMismatch(
                f"the messages have {asked} {name} parts, but {len(given)} {name}s came with them"
            )
        fillers[pad] = iter(given)
    return re.sub("|".join(map(re.escape, fillers)), lambda pad: next(fillers[pad[0]]), text)


def slow_fast_filler(frame_tokens: Sequence[int], types: Sequence[int], timestamps: Sequence[float] | None) -> str:
    """The text of a 1.5 video: for each frame its mark, its time, its pads; pads of fast frames in brackets."""
    pieces = []
    for index, (tokens, kind) in enumerate(zip(frame_tokens, types, strict=True)):
        pads = VIDEO_PAD * tokens
        time = "" if timestamps is None else f"{timestamps[index]:.1f}"
        pieces.append(FRAME + time + (FAST_START + pads + FAST_END if kind == 1 else pads))
    return "".join(pieces)


def _is_text(part: dict[str, Any]) -> bool:
    """As the templates read it: a part that names a medium is that medium, whatever text it also holds."""
    return (
        "text" in part
        and part.get("type") not in ("image", "video")
        and not part.keys() & {"image", "image_url", "video"}
    )


def readable(text: str) -> str:
    """A rendered prompt without the cuts, for people."""
    return text.replace(_CUT, "")


def _append_to_last_user_text(conversation: list[Message], suffix: str) -> None:
    last = next((message for message in reversed(conversation) if message["role"] == "user"), None)
    if last is None:
        raise ValueError("a thinking mode needs a user message to be written into, the messages have none")
    if isinstance(last["content"], str):
        last["content"] += suffix
        return
    texts = [part for part in last["content"] if _is_text(part)]
    if texts:
        texts[-1]["text"] += suffix
    else:
        last["content"].append({"type": "text", "text": suffix})
