"""Sequences without a model, and the tokenizer of the small checkpoint."""

import random
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from keye.worker.engine.detokenizer import Detokenizer, TokenBytes
from keye.worker.engine.inbox import PendingGeneration, SamplingOptions
from keye.worker.engine.sequence import Sequence
from keye.worker.engine.stop_rules import StopRules, StopStrings
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
def make_sequence(token_bytes: TokenBytes) -> MakeSequence:
    """Makes sequences in order of arrival; keywords are fields of `SamplingOptions`."""
    arrivals = count()

    def make(ids: list[int], priority: int = 0, deadline: float | None = None, **sampling: Any) -> Sequence:
        greedy = {"max_new_tokens": 8, "temperature": 0, "top_p": 1, "top_k": 0, "repetition_penalty": 1, "stop": ()}
        options = SamplingOptions(**{**greedy, "seed": None, **sampling})
        prompt = PreparedPrompt("", torch.tensor(ids), torch.arange(len(ids)).expand(3, -1), 0, 0)
        return Sequence(
            PendingGeneration(prompt, options, priority, deadline),
            arrival=next(arrivals),
            num_prompt_tokens=len(ids),
            stop_rules=StopRules((), options.max_new_tokens),
            stop_strings=StopStrings(options.stop),
            detokenizer=Detokenizer(token_bytes),
            rng=random.Random(options.seed),
        )

    return make
