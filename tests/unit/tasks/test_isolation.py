"""Ordinary jobs run side by side, a suspect runs alone and is not kept waiting for ever."""

import threading
import time

import pytest

from keye.worker.tasks.isolation import Isolation
from tests.support.conditions import eventually


class Jobs:
    """Each runs in a thread of its own until it is told to end; `running` are those that were let in."""

    def __init__(self) -> None:
        self.isolation = Isolation()
        self.running: list[str] = []
        self._ends: dict[str, threading.Event] = {}

    def start(self, name: str, alone: bool = False) -> None:
        self._ends[name] = threading.Event()
        threading.Thread(target=self._run, args=(name, alone), daemon=True).start()

    def end(self, name: str) -> None:
        self._ends[name].set()
        eventually(lambda: name not in self.running)

    def _run(self, name: str, alone: bool) -> None:
        with self.isolation.alone(name) if alone else self.isolation.beside_others():
            self.running.append(name)
            self._ends[name].wait(5)
            self.running.remove(name)


def stays_out(jobs: Jobs, name: str) -> bool:
    time.sleep(0.05)
    return name not in jobs.running


@pytest.mark.holds(
    "docs/operations.md#a-worker-was-killed-or-its-machine-is-gone-what-must-i-do",
    "finishes what it has and holds other jobs back meanwhile",
)
def test_suspect_waits_for_those_before_it_and_holds_back_those_behind_it() -> None:
    jobs = Jobs()
    jobs.start("a")
    jobs.start("b")
    eventually(lambda: sorted(jobs.running) == ["a", "b"])
    jobs.start("suspect", alone=True)
    assert stays_out(jobs, "suspect")
    jobs.start("late")
    jobs.end("a")
    assert stays_out(jobs, "late"), "or a busy worker would never come to the suspect"
    jobs.end("b")
    eventually(lambda: jobs.running == ["suspect"])
    assert stays_out(jobs, "late")
    jobs.end("suspect")
    eventually(lambda: jobs.running == ["late"])
    jobs.end("late")


def test_suspects_run_one_after_the_other() -> None:
    jobs = Jobs()
    jobs.start("first", alone=True)
    eventually(lambda: jobs.running == ["first"])
    jobs.start("second", alone=True)
    assert stays_out(jobs, "second")
    jobs.end("first")
    eventually(lambda: jobs.running == ["second"])
    jobs.end("second")


def test_second_delivery_of_a_waiting_suspect_is_sent_away_at_once() -> None:
    jobs = Jobs()
    jobs.start("a")
    eventually(lambda: jobs.running == ["a"])
    jobs.start("suspect", alone=True)
    assert stays_out(jobs, "suspect")
    with jobs.isolation.alone("suspect") as is_first:
        assert not is_first
    jobs.end("a")
    eventually(lambda: jobs.running == ["suspect"])
    jobs.end("suspect")
