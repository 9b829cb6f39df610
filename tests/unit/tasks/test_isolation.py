"""Ordinary jobs run side by side, few of those whose worker died once, a suspect alone; nobody waits for ever."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from keye.worker.tasks.isolation import MAX_COMPANY, Isolation
from tests.support.conditions import eventually


class Jobs:
    """Each runs in a thread of its own until it is told to end; `running` are those that were let in."""

    def __init__(self) -> None:
        self.isolation = Isolation()
        self.running: list[str] = []
        self.given_up: list[str] = []
        self._ends: dict[str, threading.Event] = {}
        self._gives_up: set[str] = set()

    def start(self, name: str, alone: bool = False) -> None:
        self._ends[name] = threading.Event()
        threading.Thread(target=self._run, args=(name, alone), daemon=True).start()

    def start_in_company(self, *names: str) -> None:
        """One after another, as they would come."""
        for name in names:
            has_come = threading.Event()
            self._ends[name] = threading.Event()
            threading.Thread(target=self._run_in_company, args=(name, has_come), daemon=True).start()
            assert has_come.wait(5)

    def give_up(self, name: str) -> None:
        self._gives_up.add(name)
        eventually(lambda: name in self.given_up)

    def end(self, name: str) -> None:
        self._ends[name].set()
        eventually(lambda: name not in self.running)

    def _run(self, name: str, alone: bool) -> None:
        with self.isolation.alone(name) if alone else self.isolation.beside_others(), self._noted(name):
            self._ends[name].wait(5)

    def _run_in_company(self, name: str, has_come: threading.Event) -> None:
        def check() -> None:
            has_come.set()
            if name in self._gives_up:
                raise InterruptedError

        try:
            with self.isolation.beside_others(), self.isolation.in_company(check), self._noted(name):
                has_come.set()
                self._ends[name].wait(5)
        except InterruptedError:
            self.given_up.append(name)

    @contextmanager
    def _noted(self, name: str) -> Iterator[None]:
        self.running.append(name)
        yield
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


COMPANY = [f"place {number}" for number in range(MAX_COMPANY)]


def test_of_those_whose_worker_died_once_eight_run_at_a_time_beside_all_others_in_the_order_they_came() -> None:
    jobs = Jobs()
    jobs.start_in_company(*COMPANY, "ninth", "tenth")
    jobs.start("a")
    jobs.start("b")
    eventually(lambda: set(jobs.running) == {*COMPANY, "a", "b"})
    jobs.end("a")
    assert stays_out(jobs, "ninth"), "its place is not an ordinary job's"
    jobs.end(COMPANY[3])
    eventually(lambda: "ninth" in jobs.running)
    assert stays_out(jobs, "tenth")
    jobs.end(COMPANY[0])
    eventually(lambda: "tenth" in jobs.running)
    for name in jobs.running.copy():
        jobs.end(name)


def test_a_suspect_does_not_wait_for_those_that_wait_for_company_and_goes_before_them() -> None:
    jobs = Jobs()
    jobs.start_in_company(*COMPANY, "ninth")
    eventually(lambda: jobs.running == COMPANY)
    jobs.start("suspect", alone=True)
    assert stays_out(jobs, "suspect")
    jobs.end(COMPANY[0])
    assert stays_out(jobs, "ninth"), "or a suspect would wait for all of them"
    for name in COMPANY[1:]:
        jobs.end(name)
    eventually(lambda: jobs.running == ["suspect"])
    assert stays_out(jobs, "ninth")
    jobs.end("suspect")
    eventually(lambda: jobs.running == ["ninth"])
    jobs.end("ninth")


def test_who_gives_up_waiting_for_company_leaves_no_trace() -> None:
    jobs = Jobs()
    jobs.start_in_company(*COMPANY, "ninth", "tenth")
    eventually(lambda: jobs.running == COMPANY)
    jobs.give_up("ninth")
    jobs.start("suspect", alone=True)
    for name in COMPANY:
        jobs.end(name)
    eventually(lambda: jobs.running == ["suspect"])
    jobs.start("other suspect", alone=True)
    jobs.give_up("tenth")
    assert stays_out(jobs, "other suspect"), "the one that gave up is not taken for the one that runs"
    jobs.end("suspect")
    eventually(lambda: jobs.running == ["other suspect"])
    jobs.end("other suspect")
    jobs.start_in_company("eleventh")
    eventually(lambda: jobs.running == ["eleventh"])
    jobs.end("eleventh")
