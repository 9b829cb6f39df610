"""How fast the lines of a batch end, and when all have: as it is told."""

from concurrent.futures import Future

import pytest

from keye.producer.batch.progress import BatchProgress
from keye.producer.batch_cli import Pace, in_a_line, watched

PROGRESS = BatchProgress(
    lines=1_000_000,
    answered=500_000,
    failed=12,
    in_flight=4096,
    share=None,
    is_read=True,
    trouble="",
    has_worker=True,
    ended_before=None,
    passed_over=0,
)


def test_what_had_ended_before_is_no_pace() -> None:
    pace = Pace()
    assert pace.of(PROGRESS._replace(answered=0), 0) == ""
    # All of that was found within a second.
    assert pace.of(PROGRESS, 1) == ""
    begun = PROGRESS._replace(ended_before=500_012)
    assert pace.of(begun, 2) == ""
    assert pace.of(begun._replace(answered=500_050), 12) == "5.0 lines/s, done in about 1 day, 3:46:28"


def test_is_that_of_the_last_half_minute() -> None:
    pace = Pace()
    progress = PROGRESS._replace(lines=10_000, answered=0, failed=0, ended_before=0)
    for second in range(61):
        told = pace.of(progress._replace(answered=10 * second if second < 31 else 300 + 100 * (second - 30)), second)
    assert told == "100 lines/s, done in about 0:01:07"
    for second in range(61, 100):
        told = pace.of(progress._replace(answered=3300), second)
    assert told == "0.0 lines/s"


def test_when_it_is_done_is_not_told_where_nobody_knows_how_many_there_are() -> None:
    pace = Pace()
    listed = PROGRESS._replace(lines=4200, answered=0, failed=0, is_read=False, ended_before=0, in_flight=4200)
    pace.of(listed, 0)
    told = pace.of(listed._replace(answered=100, in_flight=4100), 10)
    assert in_a_line(listed._replace(answered=100, in_flight=4100), told) == (
        "100 of 4,200 or more lines, 0 failed, 4,100 in flight, 10 lines/s"
    )


@pytest.mark.holds(
    "docs/batches.md#how-do-i-ask-about-a-whole-bucket-or-a-file-of-a-million-questions",
    "Both say what it waits for",
)
def test_what_it_waits_for_is_told_last() -> None:
    waiting = PROGRESS._replace(share=0.5, is_read=False, trouble="Redis could not be read.", has_worker=False)
    assert in_a_line(waiting, "0.0 lines/s") == (
        "500,012 of about 2,000,000 lines, 12 failed, 4,096 in flight, 0.0 lines/s; Redis could not be read; "
        "no worker is ready"
    )


def test_a_time_out_that_ends_a_batch_is_not_taken_for_one_of_the_wait() -> None:
    class Ended:
        done: Future[BatchProgress] = Future()
        progress = PROGRESS

        def wait(self, timeout: float | None = None) -> BatchProgress:
            return self.done.result(timeout)

    Ended.done.set_exception(TimeoutError("of a disk"))
    with pytest.raises(TimeoutError, match="of a disk"):
        watched(Ended(), lambda *_: None)  # type: ignore[arg-type]
