"""Whether the door takes another message, from what the attempts under way are at."""

from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any, cast

import pytest

from keye.worker.tasks.lookahead import Lookahead


def has_room(*phases: str, num_taken: int | None = None) -> bool:
    lookahead = Lookahead(num_decoders=2)
    with ExitStack() as under_way:
        for phase in phases:
            under_way.enter_context(lookahead.watching(attempt(phase)))
        return lookahead.has_room(len(phases) if num_taken is None else num_taken)


def attempt(phase: str, num_waiting: int = 1) -> Any:
    return cast(Any, _Attempt(phase, num_waiting))


class _Attempt(SimpleNamespace):
    def __init__(self, phase: str, num_waiting: int) -> None:
        super().__init__(phase=phase, seconds=1.0, num_waiting=num_waiting)

    __hash__ = object.__hash__


@pytest.mark.holds(
    "docs/operations.md#how-many-jobs-does-a-worker-take-at-a-time", "While pixels wait for memory it takes no more."
)
@pytest.mark.parametrize(
    ("phases", "most"), [("fetch", 16), ("decoder", 8), ("engine", 8), ("memory", 1)], ids=lambda each: str(each)
)
def test_each_kind_of_wait_has_its_bound(phases: str, most: int) -> None:
    assert has_room(*[phases] * (most - 1), *["running"] * 100, *["decode"] * 2)
    assert not has_room(*[phases] * most, *["running"] * 100)


@pytest.mark.parametrize("phase", ["decoder", "engine"])
def test_what_was_taken_and_is_not_claimed_yet_counts_as_on_its_way(phase: str) -> None:
    assert has_room(*["running"] * 64, *[phase] * 3, num_taken=67 + 4)
    assert not has_room(*["running"] * 64, *[phase] * 3, num_taken=67 + 5)


def test_who_is_about_to_ask_for_a_decoder_counts_with_those_that_wait_for_one() -> None:
    assert has_room(*["decode"] * (2 + 3), *["decoder"] * 4)
    assert not has_room(*["decode"] * (2 + 4), *["decoder"] * 4)


def test_the_door_looks_again_once_what_it_was_refused_for_has_changed() -> None:
    lookahead, woken = Lookahead(num_decoders=1), []
    lookahead.wake = lambda: woken.append(True)
    waiting = attempt("memory")
    with lookahead.watching(waiting):
        lookahead.changed()
        assert not woken
        assert not lookahead.has_room(1)
        waiting.phase = "decode"
        lookahead.changed()
        lookahead.changed()
        assert len(woken) == 1
        assert lookahead.has_room(1)


def test_a_job_of_many_answers_counts_as_many_for_the_engine() -> None:
    lookahead = Lookahead(num_decoders=2)
    several = attempt("engine", num_waiting=8)
    with lookahead.watching(several):
        assert not lookahead.has_room(1)
        assert lookahead.phases() == ["engine"] * 8
        several.num_waiting = 7
        assert lookahead.has_room(1)
        several.phase = "decode"
        assert lookahead.phases() == ["decode"]
