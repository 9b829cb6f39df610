"""Which failures get another attempt, when, and with how much of the media."""

import time
from math import inf
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keye.config.codes import ErrorCode
from keye.config.faults import Fault
from keye.worker.leases.job_lease import Claimed
from keye.worker.media.fetch.transfer import read_retry_after
from keye.worker.tasks.retry_policy import (
    MAX_PAUSE_SECONDS,
    MAX_RETRY_AFTER_SECONDS,
    RetryDecision,
    decide_retry,
)

PASSES_OR_SHRINKS = {ErrorCode.MEDIA_UNREACHABLE, ErrorCode.OUT_OF_MEMORY}


def retry_of(jitter: float, code: ErrorCode = ErrorCode.MEDIA_UNREACHABLE, **facts: Any) -> RetryDecision | None:
    fault = Fault(code, "it failed", retry_after_seconds=facts.pop("retry_after", None))
    attempt, max_attempts = facts.pop("attempt", 1), facts.pop("max_attempts", 10)
    lease = Claimed("job", "token", attempt, max_attempts, 0.0, None, None, None)
    known = {"num_visual_tokens": 1000, "seconds_to_deadline": inf, **facts}
    return decide_retry(fault, lease, **known, jitter=jitter)


@pytest.mark.holds(
    "docs/operations.md#which-failures-are-tried-again",
    "Those that pass by themselves (`MEDIA_UNREACHABLE`) or can be made smaller (`OUT_OF_MEMORY`",
    "Everything else ends the job at once",
)
@pytest.mark.parametrize("code", ErrorCode)
def test_only_what_passes_or_can_be_made_smaller_is_tried_again(code: ErrorCode) -> None:
    assert (retry_of(0.5, code) is not None) == (code in PASSES_OR_SHRINKS)


@pytest.mark.holds("docs/operations.md#which-failures-are-tried-again", "up to `max_attempts`")
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
    seconds_to_deadline=st.just(inf) | st.floats(-1e3, 1e6),
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
    assert again.pause_seconds < facts["seconds_to_deadline"]
    if code is ErrorCode.OUT_OF_MEMORY:
        assert again.max_visual_tokens is not None
        assert 0 < again.max_visual_tokens <= facts["num_visual_tokens"] / 2
    else:
        assert again.max_visual_tokens is None


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
