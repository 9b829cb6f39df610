"""The door between a job's thread and the step thread."""

import threading
import time
from collections.abc import Callable
from math import inf

import pytest

from keye.config.codes import ErrorCode
from keye.config.faults import Fault
from keye.worker.engine.inbox import (
    OVERRUN_SECONDS,
    Generated,
    Generations,
    Inbox,
    PendingGeneration,
    SamplingOptions,
    TextDelta,
)
from keye.worker.model.processor import PreparedPrompt
from tests.support.conditions import eventually

MakePrompt = Callable[[list[int]], PreparedPrompt]
OPTIONS = SamplingOptions(10)
FAULT = Fault(ErrorCode.INTERNAL, "The engine has been stopped.")
GENERATED = Generated("two", (1, 2), "stop", 1, 0.1, 0.2, 0.3)


def test_job_that_could_never_fit_is_refused_with_the_numbers(make_prompt: MakePrompt) -> None:
    with pytest.raises(Fault, match="need 31 tokens, this worker holds 30") as refused:
        Inbox(max_tokens=30).submit(make_prompt([0] * 21), OPTIONS)
    assert refused.value.code is ErrorCode.PROMPT_TOO_LONG


def test_job_that_just_fits_is_taken(make_prompt: MakePrompt) -> None:
    inbox = Inbox(max_tokens=30)
    pending = inbox.submit(make_prompt([0] * 20), OPTIONS, priority=3, deadline=5.0)
    assert inbox.drain() == [pending]
    assert inbox.drain() == []
    assert (pending.priority, pending.deadline) == (3, 5.0)


def test_closed_inbox_refuses_and_gives_back_what_nobody_took(make_prompt: MakePrompt) -> None:
    inbox = Inbox(max_tokens=30)
    pending = inbox.submit(make_prompt([0]), OPTIONS)
    assert inbox.close(FAULT) == [pending]
    with pytest.raises(Fault, match="stopped"):
        inbox.submit(make_prompt([0]), OPTIONS)


def test_engine_sleeps_until_something_arrives(make_prompt: MakePrompt) -> None:
    inbox = Inbox(max_tokens=30)
    waiter = threading.Thread(target=inbox.wait)
    waiter.start()
    inbox.submit(make_prompt([0]), OPTIONS)
    waiter.join(timeout=10)
    assert not waiter.is_alive()


def test_reader_in_another_thread_gets_all_text_and_then_the_end(make_prompt: MakePrompt) -> None:
    pending = PendingGeneration(make_prompt([0]), OPTIONS)
    read: list[TextDelta] = []
    reader = threading.Thread(target=lambda: read.extend(pending.deltas()))
    reader.start()
    for step in range(100):
        pending.deliver(f"{step} ", 1)
    pending.end(GENERATED)
    reader.join(timeout=10)
    assert "".join(delta.text for delta in read) == "".join(f"{step} " for step in range(100))
    assert sum(delta.num_tokens for delta in read) == 100
    assert pending.generated is GENERATED


def test_failed_generation_raises_after_the_text_that_came(make_prompt: MakePrompt) -> None:
    pending = PendingGeneration(make_prompt([0]), OPTIONS)
    pending.deliver("so far", 2)
    pending.end(FAULT)
    deltas = pending.deltas()
    assert next(deltas) == TextDelta("so far", 2)
    with pytest.raises(Fault, match="stopped"):
        next(deltas)
    with pytest.raises(Fault, match="stopped"):
        _ = pending.generated


def test_result_cannot_be_read_before_the_end(make_prompt: MakePrompt) -> None:
    with pytest.raises(RuntimeError, match="has not ended"):
        _ = PendingGeneration(make_prompt([0]), OPTIONS).generated


def test_reader_does_not_wait_for_an_engine_that_is_long_past_the_deadline(make_prompt: MakePrompt) -> None:
    pending = PendingGeneration(make_prompt([0]), OPTIONS, deadline=time.monotonic() - OVERRUN_SECONDS)
    pending.deliver("so far", 2)
    assert list(pending.deltas()) == [TextDelta("so far", 2)]
    assert pending.is_abandoned


def a_few(make_prompt: MakePrompt, deadline: float = inf) -> list[PendingGeneration]:
    changed = threading.Condition()
    return [PendingGeneration(make_prompt([0]), OPTIONS, 0, deadline, changed) for _ in range(3)]


def test_one_reader_gets_the_text_of_several_and_the_end_of_each(make_prompt: MakePrompt) -> None:
    pending = a_few(make_prompt)
    read: list[tuple[int, TextDelta, bool]] = []
    reader = threading.Thread(target=lambda: read.extend(Generations(pending).deltas()))
    reader.start()
    for step in range(100):
        pending[step % 3].deliver(f"{step} ", 1)
    pending[1].end(FAULT)
    pending[0].end(GENERATED)
    eventually(lambda: sum(has_ended for _, _, has_ended in read) == 2)
    pending[2].deliver("more", 1)
    pending[2].end(GENERATED)
    reader.join(timeout=10)
    assert not reader.is_alive()
    for place in range(3):
        own = [each for each in read if each[0] == place]
        expected = "".join(f"{step} " for step in range(place, 100, 3)) + "more" * (place == 2)
        assert "".join(delta.text for _, delta, _ in own) == expected
        assert [has_ended for _, _, has_ended in own] == [False] * (len(own) - 1) + [True]
    assert [each.fault for each in pending] == [None, FAULT, None]


def test_several_wait_for_the_engine_until_one_begins(make_prompt: MakePrompt) -> None:
    pending = a_few(make_prompt)
    for each in pending:
        each.has_begun = False
    several = Generations(pending)
    assert (several.num_waiting, several.has_begun, several.wait_to_begin(0)) == (3, False, False)
    waiter = threading.Thread(target=several.wait_to_begin)
    waiter.start()
    eventually(lambda: all(each.is_awaited for each in pending))
    pending[1].begin()
    waiter.join(timeout=10)
    assert not waiter.is_alive()
    assert (several.num_waiting, several.has_begun, several.has_ended) == (2, True, False)
    pending[2].end(FAULT)
    assert several.num_waiting == 1


def test_nobody_waits_for_several_that_are_long_past_the_deadline(make_prompt: MakePrompt) -> None:
    pending = a_few(make_prompt, time.monotonic() - OVERRUN_SECONDS)
    pending[2].deliver("so far", 2)
    assert list(Generations(pending).deltas()) == [(2, TextDelta("so far", 2), False)]
    assert all(each.is_abandoned for each in pending)
