"""Which failures get another attempt, when, and with how much of the media."""

import time
from dataclasses import replace
from math import inf
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keye.config.codes import ErrorCode
from keye.config.faults import Fault
from keye.config.job import AnalysisJob
from keye.worker.leases.claims import Claimed
from keye.worker.media.fetch.transfer import read_retry_after
from keye.worker.tasks.retry_policy import (
    MAX_PAUSE_SECONDS,
    MAX_RETRY_AFTER_SECONDS,
    RetryDecision,
    decide_retry,
    is_to_blame,
    window_of,
)

PASSES_OR_SHRINKS = {ErrorCode.MEDIA_UNREACHABLE, ErrorCode.OUT_OF_MEMORY}


def retry_of(jitter: float, code: ErrorCode = ErrorCode.MEDIA_UNREACHABLE, **facts: Any) -> RetryDecision | None:
    fault = Fault(code, "it failed", retry_after_seconds=facts.pop("retry_after", None))
    window_seconds, num_visual_tokens = facts.pop("window_seconds", None), facts.pop("num_visual_tokens", 1000)
    lease = a_lease(**facts)
    # It failed a second after its claim.
    return decide_retry(fault, lease, num_visual_tokens, 1.0, window_seconds, jitter)


def a_lease(
    attempt: int = 1,
    max_attempts: int = 10,
    seconds_to_deadline: float | None = None,
    num_unreachable: int = 0,
    seconds_unreachable: float = 0,
) -> Claimed:
    """Claimed a second ago; the rest is as of now."""
    return Claimed(
        *("job", "token", attempt, max_attempts, 1000.0, None),
        deadline_at=None if seconds_to_deadline is None else 1001.0 + seconds_to_deadline,
        idempotency_key=None,
        unreachable_since=1001.0 - seconds_unreachable if num_unreachable else None,
        num_unreachable=num_unreachable,
    )


@pytest.mark.holds(
    "docs/operations.md#which-failures-are-tried-again",
    "Those that pass by themselves (`MEDIA_UNREACHABLE`) or can be made smaller (`OUT_OF_MEMORY`",
    "Everything else ends the job at once",
)
@pytest.mark.parametrize("code", ErrorCode)
def test_only_what_passes_or_can_be_made_smaller_is_tried_again(code: ErrorCode) -> None:
    assert (retry_of(0.5, code) is not None) == (code in PASSES_OR_SHRINKS)


@pytest.mark.holds(
    "docs/operations.md#which-failures-are-tried-again", "A job that sets `max_attempts` has so many attempts"
)
def test_last_attempt_has_no_next() -> None:
    assert retry_of(0.5, attempt=1, max_attempts=2) is not None
    assert retry_of(0.5, attempt=2, max_attempts=2) is None


@pytest.mark.holds(
    "docs/operations.md#which-failures-are-tried-again",
    "The pause is drawn evenly from 0 to 4, 8, 16 ..",
)
def test_pause_is_anything_below_a_ceiling_that_doubles() -> None:
    ceilings = [retry_of(1.0, attempt=attempt) for attempt in range(1, 10)]
    pauses = [decision.pause_seconds for decision in ceilings if decision]
    assert pauses[:4] == [4, 8, 16, 32]
    assert pauses[-1] == MAX_PAUSE_SECONDS
    assert retry_of(0.0, attempt=5) == RetryDecision(0.0)


def test_store_is_left_alone_for_as_long_as_it_asked() -> None:
    assert retry_of(0.0, retry_after=30) == RetryDecision(30.0)
    assert retry_of(0.0, retry_after=86400) == retry_of(0.0, retry_after=inf) == RetryDecision(3600.0)
    assert retry_of(0.0, retry_after=86400, seconds_to_deadline=3600) is None


@pytest.mark.holds("docs/operations.md#which-failures-are-tried-again", "no attempt begins behind the job's deadline")
def test_attempt_that_would_begin_behind_the_deadline_is_not_waited_for() -> None:
    assert retry_of(0.5, seconds_to_deadline=2.1) == RetryDecision(2.0)
    assert retry_of(0.5, seconds_to_deadline=1.9) is None


@given(
    code=st.sampled_from(ErrorCode),
    attempt=st.integers(1, 20),
    max_attempts=st.integers(1, 20),
    retry_after=st.none() | st.floats(0, 1e6),
    seconds_to_deadline=st.none() | st.floats(-1e3, 1e6),
    num_visual_tokens=st.integers(0, 10**6),
    jitter=st.floats(0, 1, exclude_max=True),
)
def test_whatever_failed_the_next_attempt_is_neither_too_soon_nor_too_late_nor_one_too_many(
    code: ErrorCode, jitter: float, **facts: Any
) -> None:
    again = retry_of(jitter, code, **facts)
    if again is None:
        return
    assert code in PASSES_OR_SHRINKS
    assert facts["attempt"] < facts["max_attempts"]
    asked_for = min(facts["retry_after"] or 0.0, MAX_RETRY_AFTER_SECONDS)
    assert asked_for <= again.pause_seconds <= asked_for + MAX_PAUSE_SECONDS
    assert facts["seconds_to_deadline"] is None or again.pause_seconds <= facts["seconds_to_deadline"]
    if code is ErrorCode.OUT_OF_MEMORY:
        assert again.max_visual_tokens is not None
        assert 0 < again.max_visual_tokens <= facts["num_visual_tokens"] / 2
    else:
        assert again.max_visual_tokens is None


@pytest.mark.holds(
    "docs/operations.md#which-failures-are-tried-again",
    "for `KEYE_MEDIA_RETRY_SECONDS` (15 minutes) from the first time on that they were, the last time at their end",
)
def test_unreachable_media_are_tried_to_the_end_of_the_window_whatever_attempts_are_left() -> None:
    away: dict[str, Any] = {"window_seconds": 900, "attempt": 30, "max_attempts": 30}
    assert retry_of(0.5, **away) == RetryDecision(60.0, counts=False)
    assert retry_of(0.5, **away, num_unreachable=20, seconds_unreachable=800) == RetryDecision(60.0, counts=False)
    assert retry_of(0.5, **away, num_unreachable=20, seconds_unreachable=880) == RetryDecision(20.0, counts=False)
    assert retry_of(0.5, **away, num_unreachable=20, seconds_unreachable=900) is None
    assert retry_of(0.5, **away, seconds_to_deadline=59) is None
    assert retry_of(0.5, **{**away, "attempt": 10_000}) == RetryDecision(60.0, counts=False)


@pytest.mark.parametrize("retry_after", [None, 0, 30])
@pytest.mark.parametrize("seed", range(20))
def test_outage_shorter_than_the_window_costs_no_job_and_few_attempts(seed: int, retry_after: float | None) -> None:
    random, num_tries, now = Random(seed), 0, 0.0
    while (
        again := retry_of(
            random.random(),
            window_seconds=900,
            retry_after=retry_after,
            attempt=num_tries + 1,
            num_unreachable=num_tries,
            seconds_unreachable=now,
        )
    ) is not None:
        now += again.pause_seconds
        num_tries += 1
    assert 900 - (retry_after or 0) <= now < 901, "the last was at the end"
    assert num_tries < 60


@pytest.mark.holds("docs/operations.md#which-failures-are-tried-again", "and three times at least")
def test_store_that_asks_for_longer_than_the_window_is_tried_three_times() -> None:
    away: dict[str, Any] = {"window_seconds": 900, "retry_after": 1800}
    assert retry_of(0.0, **away) == RetryDecision(1800.0, counts=False)
    assert retry_of(0.0, **away, num_unreachable=1, seconds_unreachable=1800) == RetryDecision(1800.0, counts=False)
    assert retry_of(0.0, **away, num_unreachable=2, seconds_unreachable=3600) is None
    assert retry_of(0.0, window_seconds=0) == RetryDecision(0.0, counts=False)
    assert retry_of(0.0, window_seconds=0, num_unreachable=2, seconds_unreachable=5) is None


def test_window_is_for_media_only_and_for_jobs_that_do_not_say_how_often() -> None:
    assert retry_of(0.5, ErrorCode.OUT_OF_MEMORY, attempt=3, max_attempts=3, window_seconds=900) is None
    silent, once = AnalysisJob(prompt="?"), AnalysisJob(prompt="?", max_attempts=1)
    assert window_of(silent, a_lease(max_attempts=3), 900) == 900
    assert window_of(once, a_lease(max_attempts=1), 900) is None
    assert window_of(AnalysisJob(prompt="?", max_attempts=3), a_lease(max_attempts=3), 900) is None
    assert window_of(silent, a_lease(max_attempts=1), 900) is None, "a producer of its own wrote so into the record"


def test_too_large_for_the_memory_is_tried_with_half_of_what_was_shown() -> None:
    again = retry_of(0.5, ErrorCode.OUT_OF_MEMORY, num_visual_tokens=1001)
    assert again == RetryDecision(2.0, max_visual_tokens=500)
    assert retry_of(0.5, ErrorCode.OUT_OF_MEMORY, num_visual_tokens=0) is None, "text cannot shrink"


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("120", 120.0),
        (" 7 ", 7.0),
        ("9" * 400, inf),
        ("soon", None),
        ("", None),
        ("-3", None),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
        ("Thu, 31 Dec 9999 23:59:59 GMT", 251e9),
        ("Thu, 31 Dec 99999 23:59:59 GMT", None),
    ],
)
def test_retry_after_is_read_in_both_of_its_forms(header: str | None, seconds: float | None) -> None:
    assert read_retry_after(header) == (seconds and pytest.approx(seconds, rel=0.02))


@pytest.mark.parametrize("form", ["%a, %d %b %Y %H:%M:%S GMT", "%A, %d-%b-%y %H:%M:%S GMT", "%a %b %d %H:%M:%S %Y"])
def test_retry_after_may_be_a_date_in_any_of_the_forms_of_http(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    try:
        assert read_retry_after(time.strftime(form, time.gmtime(time.time() + 90))) == pytest.approx(90, abs=5)
    finally:
        monkeypatch.undo()
        time.tzset()


@given(st.text() | st.from_regex(r"\w{3}, \d+ (Jan|Feb) \d+ \d+:\d+:\d+ ([+-]?\d+|GMT|XYZ)", fullmatch=True))
def test_whatever_a_store_writes_as_retry_after_is_no_fault_of_ours(header: str) -> None:
    seconds = read_retry_after(header)
    assert seconds is None or seconds >= 0


@pytest.mark.parametrize(
    ("met_before", "is_alone", "is_blamed"),
    [
        ({}, False, False),
        ({"here": 1}, False, False),
        ({"there": 1}, False, False),
        ({"here": 1}, True, False),
        ({"here": 2}, True, False),
        ({"here": 3}, True, True),
        ({"there": 1}, True, True),
    ],
)
@pytest.mark.holds(
    "docs/operations.md#a-worker-says-that-it-is-sick-what-must-i-do",
    "One that meets its fault three times more on that worker, or on a second one, ends as `HOST_FAULT`",
)
def test_a_job_is_to_blame_for_its_hosts_only_alone_and_again(
    met_before: dict[str, int], is_alone: bool, is_blamed: bool
) -> None:
    lease = replace(a_lease(), host_faults=met_before, is_alone=is_alone)
    assert is_to_blame(lease, "here") is is_blamed
