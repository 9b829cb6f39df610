"""When a dead child is started again."""

import pytest

from keye.worker.daemon.supervisor import MAX_DEATHS_BEFORE_READY, STEADY_SECONDS, Child


@pytest.mark.holds(
    "docs/operations.md#a-worker-was-killed-or-its-machine-is-gone-what-must-i-do",
    "The supervisor starts a dead process again after 1, 2, 4 ..",
)
def test_pauses_grow_from_one_second_to_a_minute_and_no_further() -> None:
    child = Child(gpu=None, index=0)
    pauses = [child.pause_after_death(ready_seconds=0.5) for _ in range(9)]
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]


@pytest.mark.holds(
    "docs/operations.md#a-worker-was-killed-or-its-machine-is-gone-what-must-i-do",
    "a minute of being ready brings the pause back to 1",
)
def test_a_steady_run_brings_the_pause_back_to_one_second() -> None:
    child = Child(gpu=None, index=0)
    for _ in range(4):
        child.pause_after_death(ready_seconds=0.5)
    assert child.pause_after_death(ready_seconds=STEADY_SECONDS) == 1
    assert child.pause_after_death(ready_seconds=0.5) == 2


@pytest.mark.holds(
    "docs/operations.md#a-worker-was-killed-or-its-machine-is-gone-what-must-i-do",
    "One that dies five times in a row before it is ready is given up",
)
def test_a_child_that_never_becomes_ready_is_given_up() -> None:
    child = Child(gpu=None, index=0)
    pauses = [child.pause_after_death(ready_seconds=None) for _ in range(MAX_DEATHS_BEFORE_READY)]
    assert pauses == [1, 2, 4, 8, None]


def test_deaths_before_ready_count_only_in_a_row() -> None:
    child = Child(gpu=None, index=0)
    for _ in range(MAX_DEATHS_BEFORE_READY - 1):
        assert child.pause_after_death(ready_seconds=None) is not None
    assert child.pause_after_death(ready_seconds=3) == 16
    for _ in range(MAX_DEATHS_BEFORE_READY - 1):
        assert child.pause_after_death(ready_seconds=None) is not None
    assert child.pause_after_death(ready_seconds=None) is None
