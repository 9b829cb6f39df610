"""Sequences without a model, and the tokenizer of the small checkpoint."""

from collections.abc import Callable
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch

from keye.worker.engine.block_keys import BlockKeys
from keye.worker.engine.detokenizer import TokenBytes
from keye.worker.engine.inbox import PendingGeneration, SamplingOptions
from keye.worker.engine.sequence import Sequence
from keye.worker.engine.thinking_budget import ThinkingTags
from keye.worker.model.processor import KeyeProcessor, PreparedPrompt

torch.set_num_threads(1)

MakeSequence = Callable[..., Sequence]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return KeyeProcessor.from_checkpoint(Path(__file__).parents[2] / "golden" / "preview" / "checkpoint").tokenizer


@pytest.fixture(scope="session")
def token_bytes(tokenizer: Any) -> TokenBytes:
    return TokenBytes(tokenizer)


@pytest.fixture
def make_prompt() -> Callable[[list[int]], PreparedPrompt]:
    return lambda ids: PreparedPrompt("", torch.tensor(ids), torch.arange(len(ids)).expand(3, -1), 0, 0)


@pytest.fixture(scope="session")
def make_sequence(tokenizer: Any, token_bytes: TokenBytes) -> MakeSequence:
    """Makes sequences in order of arrival; keywords are fields of `SamplingOptions`.

    With a `block_size` they share blocks.
    """

    def make(
        ids: list[int],
        priority: int = 0,
        deadline: float = inf,
        eos_token_ids: tuple[int, ...] = (),
        block_size: int | None = None,
        **sampling: Any,
    ) -> Sequence:
        options = SamplingOptions(**{"max_new_tokens": 8, **sampling})
        prompt = PreparedPrompt("", torch.tensor(ids), torch.arange(len(ids)).expand(3, -1), 0, 0)
        pending = PendingGeneration(prompt, options, priority, deadline)
        pending.block_keys = None if block_size is None else BlockKeys(prompt, [], block_size)
        return Sequence(pending, token_bytes, eos_token_ids, ThinkingTags.of(tokenizer))

    return make
