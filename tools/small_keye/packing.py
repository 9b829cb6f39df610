"""Packs lessons into batches: one row a lesson, its questions behind the same media. Draws nothing.

A row is `prefix | question, reply | question, reply | ...` under a mask that lets each question see the prefix and
itself: it is learnt exactly as in a prompt of its own, while the media are encoded once. Where the lesson is a
conversation, each question sees all that was said before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from keye.worker.model.configuration_keye import KeyeConfig
from keye.worker.model.positions import position_ids
from tools.small_keye.lessons import IGNORED, Item, Lesson
from tools.small_keye.tokenizer import SUFFIXES

_PREFIX = 1  # the block that every question of a row sees; padding is block 0, which none does


@dataclass(frozen=True)
class Batch:
    """B rows of L tokens, padded on the right."""

    input_ids: Tensor
    """int64 [B, L]"""
    position_ids: Tensor
    """int64 [3, B, L]"""
    attention_mask: Tensor
    """bool [B, 1, L, L]: may the token of this row see the token of that column"""
    targets: Tensor
    """int64 [B, L]: the token to say next, IGNORED where nothing is learnt"""
    asked: Tensor
    """int64 [B, L]: the question a target belongs to, an index of `kinds`"""
    kinds: Sequence[str]
    items: Sequence[Item]

    @cached_property
    def weights(self) -> Tensor:
        """Float [targets]: a long reply counts more than a short one, but not as many times as it is longer."""
        asked = self.asked[self.targets != IGNORED]
        return torch.bincount(asked, minlength=len(self.kinds))[asked] ** -0.5


class Packer:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._config = KeyeConfig(
            image_token_id=int(self._encode("<|image_pad|>")), video_token_id=int(self._encode("<|video_pad|>"))
        )

    def pack(self, lessons: Sequence[Lesson]) -> Batch:
        """One row a lesson."""
        rows = [self._row(lesson) for lesson in lessons]
        length = max(row.shape[1] for row in rows)
        table = torch.stack([F.pad(row, (0, length - row.shape[1])) for row in rows], dim=1)
        input_ids, targets, turns, blocks = table[:4]
        is_seen = (blocks.unsqueeze(1) == _PREFIX) | (blocks.unsqueeze(1) == blocks.unsqueeze(2))
        num_asks = [len(lesson.asks) for lesson in lessons]
        firsts = torch.tensor([0, *num_asks[:-1]]).cumsum(0).unsqueeze(1)
        return Batch(
            input_ids=input_ids,
            position_ids=table[4:],
            attention_mask=(is_seen & torch.ones(length, length, dtype=torch.bool).tril()).unsqueeze(1),
            # The table pads with zero, so targets are stored one higher in it.
            targets=torch.where(targets > 0, targets - 1, IGNORED),
            asked=firsts + turns,
            kinds=[question.kind for lesson in lessons for question, _ in lesson.asks],
            items=[item for lesson in lessons for item in lesson.items],
        )

    def _row(self, lesson: Lesson) -> Tensor:
        """int64 [7, length]: token, target + 1, number of the question, block, and three rows of positions."""
        prefix, positions, next_position = self._prefix(lesson)
        nothing = torch.zeros_like(prefix)
        parts = [torch.stack([prefix, nothing, nothing, nothing + _PREFIX, *positions])]
        for turn, (question, thinking) in enumerate(lesson.asks):
            goes_on = lesson.is_conversation and turn > 0
            opening = "<|im_end|>\n<|im_start|>user\n" if goes_on else ""
            ask = self._encode(f"{opening}{question.text}{SUFFIXES[thinking]}<|im_end|>\n<|im_start|>assistant\n")
            reply = self._encode(f"{question.reply(thinking)}<|im_end|>")
            tokens = torch.cat([ask, reply[:-1]])
            targets = torch.cat([torch.zeros(len(ask) - 1, dtype=torch.long), reply + 1])
            block = _PREFIX if lesson.is_conversation else _PREFIX + 1 + turn
            position = torch.arange(len(tokens)) + next_position
            if lesson.is_conversation:
                next_position += len(tokens)
            numbers = torch.full_like(tokens, turn), torch.full_like(tokens, block)
            parts.append(torch.stack([tokens, targets, *numbers, position, position, position]))
        return torch.cat(parts, dim=1)

    def _prefix(self, lesson: Lesson) -> tuple[Tensor, Tensor, int]:
        """The tokens [P] up to the first question, their positions [3, P], and the position behind them."""
        is_video = lesson.fps is not None
        pad = "<|video_pad|>" if is_video else "<|image_pad|>"
        media = [f"<|vision_start|>{pad * len(item.sights)}<|vision_end|>" for item in lesson.items]
        tokens = self._encode("<|im_start|>user\n" + "".join(media))
        grids = [item.grid for item in lesson.items]
        positions, delta = position_ids(
            tokens,
            self._config,
            image_grids=() if is_video else grids,
            video_grids=grids if is_video else (),
            seconds_per_frame=None if lesson.fps is None else [1 / lesson.fps],
        )
        return tokens, positions, len(tokens) + delta

    def _encode(self, text: str) -> Tensor:
        return torch.tensor(self.tokenizer.encode(text).ids)
