"""A clock that was set is told from one that is merely read late, from one that drifts, and from a first look."""

import pytest

from keye.worker.leases.server_clock import ServerClock


@pytest.fixture
def clock() -> ServerClock:
    clock = ServerClock(tolerance_seconds=2)
    assert clock.read(1000, asked_at=10, answered_at=10.5) == 0, "nothing is known before"
    return clock


@pytest.mark.holds("docs/reliability.md#promises", "Workers hold it against their own, which nobody sets")
@pytest.mark.parametrize("seconds", [120, -600])
def test_a_step_is_found_once(clock: ServerClock, seconds: float) -> None:
    assert clock.read(1002 + seconds, asked_at=12, answered_at=12.1) == pytest.approx(seconds, abs=0.6)
    assert clock.read(1004 + seconds, asked_at=14, answered_at=14.1) == 0
    assert clock.read(1006, asked_at=16, answered_at=16.1) == pytest.approx(-seconds, abs=0.6)


def test_an_answer_that_takes_long_is_no_step(clock: ServerClock) -> None:
    assert clock.read(1002, asked_at=12, answered_at=42) == 0, "shown at once, and told late"
    assert clock.read(1063, asked_at=43, answered_at=73.5) == 0, "asked late"
    assert clock.read(1065 + 120, asked_at=75, answered_at=75.1) == pytest.approx(120, abs=0.6), "known as well"


def test_drift_and_small_steps_are_no_step_however_many(clock: ServerClock) -> None:
    ahead = 990.0
    for second in range(12, 1000, 2):
        ahead += 0.5
        assert clock.read(second + ahead, asked_at=second, answered_at=second) == 0


def test_what_it_can_show_at_the_most_is_known_until_it_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = ServerClock(tolerance_seconds=2)
    monkeypatch.setattr("time.monotonic", lambda: 20.0)
    assert clock.latest == float("inf")
    clock.read(1000, asked_at=10, answered_at=10.5)
    assert clock.latest == 1010
