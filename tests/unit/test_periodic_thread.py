"""What the worker's background threads have in common."""

import threading
from collections.abc import Callable

import pytest
from redis import Redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from keye.worker.periodic_thread import PeriodicThread
from tests.support.conditions import eventually


class Counting(PeriodicThread):
    def __init__(self, period_seconds: float, then: Callable[[], None] = lambda: None) -> None:
        super().__init__("counting", period_seconds)
        self.num_turns = 0
        self._then = then

    def turn(self) -> None:
        self.num_turns += 1
        self._then()


def test_turns_come_every_period() -> None:
    thread = Counting(0.01)
    thread.start()
    eventually(lambda: thread.num_turns >= 3)
    thread.stop()


def test_who_is_woken_takes_a_turn_now_and_else_waits_for_its_period() -> None:
    thread = Counting(3600)
    thread.start()
    assert thread.num_turns == 0
    thread.wake()
    eventually(lambda: thread.num_turns == 1)
    thread.stop()
    assert thread.num_turns == 1


def test_a_fault_is_logged_and_the_next_turn_comes(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise ValueError("of its own")

    thread = Counting(0.01, fail)
    thread.start()
    eventually(lambda: thread.num_turns >= 2)
    thread.stop()
    assert "counting: a fault of its own, going on" in caplog.text


def test_a_stop_waits_for_the_turn_that_is_being_taken() -> None:
    begun, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def take_long() -> None:
        begun.set()
        may_end.wait(10)
        ended.set()

    thread = Counting(0.01, take_long)
    thread.start()
    assert begun.wait(10)
    threading.Timer(0.1, may_end.set).start()
    thread.stop()
    assert ended.is_set()
    assert thread.num_turns == 1


def test_a_redis_that_is_away_takes_one_line_and_the_next_turn_comes(caplog: pytest.LogCaptureFixture) -> None:
    thread = Counting(0.01, Redis(host="127.0.0.1", port=1, retry=Retry(NoBackoff(), 0)).ping)
    thread.start()
    eventually(lambda: thread.num_turns >= 2)
    thread.stop()
    assert "counting: Error 111 connecting to 127.0.0.1:1. Connection refused., next try in 0.01 s" in caplog.text
    assert "Traceback" not in caplog.text
