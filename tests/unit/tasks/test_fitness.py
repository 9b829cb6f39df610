"""When a worker is sick, when it is well again, and what speaks against a job."""

import threading
from types import SimpleNamespace

import pytest

from keye.worker.host_fault import HostFault, host_fault_of
from keye.worker.tasks import fitness
from keye.worker.tasks.fitness import MAX_PAUSE_SECONDS, REST_SECONDS, Fitness

FULL = OSError(28, "No space left on device")


class Host:
    """The probe meets `trouble`, waits for it, or tells that it passes (True) or cannot tell (False). Time stands still
    by itself."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.trouble: bool | Exception | threading.Event = True
        self.told: list[str] = []
        self.num_probes = 0
        self.door = SimpleNamespace(is_open=True)
        self.now = 1000.0
        monkeypatch.setattr(fitness, "time", SimpleNamespace(monotonic=lambda: self.now))
        self.fitness = Fitness(self._probe, self.door, self.told.append)  # type: ignore[arg-type]

    def _probe(self) -> bool:
        self.num_probes += 1
        if isinstance(self.trouble, Exception):
            raise self.trouble
        if isinstance(self.trouble, threading.Event):
            return self.trouble.wait(60)
        return self.trouble

    def suffer(self, job_id: str = "one", is_final: bool = False) -> bool:
        self.now += 0.001
        return self.fitness.suffered(HostFault("it broke", is_final=is_final), job_id)

    def wait(self, seconds: float) -> None:
        """A look at every quarter of a second, as the thread takes it."""
        for _ in range(round(seconds * 4)):
            self.now += 0.25
            self.fitness.turn()


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(monkeypatch)


@pytest.mark.holds(
    "docs/operations.md#a-worker-says-that-it-is-sick-what-must-i-do",
    "The worker then probes itself",
    "Where that fails, or three jobs in a row met such faults, it is `sick`",
    "It takes no jobs, finishes what it has, and probes itself again after 1, 2, 4",
)
def test_a_worker_whose_probe_fails_is_sick_until_one_passes(host: Host) -> None:
    host.trouble = FULL
    assert not host.suffer()
    assert host.told == ["[Errno 28] No space left on device"]
    assert not host.door.is_open
    assert not host.suffer("another"), "nothing speaks against a job of a sick worker"
    assert host.num_probes == 1

    host.wait(0.75)
    assert host.num_probes == 1
    host.wait(1 + 2 + 4 + 8)
    assert host.num_probes == 5
    before = host.num_probes
    host.wait(4 * MAX_PAUSE_SECONDS)
    assert host.num_probes - before == 4
    assert len(host.told) == 1
    assert not host.door.is_open

    host.trouble = True
    host.wait(MAX_PAUSE_SECONDS)
    assert host.told[1:] == [""]
    assert host.door.is_open


@pytest.mark.holds(
    "docs/operations.md#a-worker-says-that-it-is-sick-what-must-i-do", "Where the probe passes, the job is suspected"
)
def test_a_fault_that_the_probe_does_not_meet_speaks_against_its_job_and_leaves_others_the_first_go(host: Host) -> None:
    assert host.suffer()
    assert not host.door.is_open
    host.wait(REST_SECONDS - 0.25)
    assert not host.door.is_open
    host.wait(0.5)
    assert host.door.is_open
    assert host.told == []


def test_one_job_again_and_again_makes_no_worker_sick_and_three_in_a_row_do(host: Host) -> None:
    for _ in range(5):
        assert host.suffer("one")
    assert host.told == []
    host.suffer("two")
    host.fitness.answered()
    host.suffer("three")
    host.suffer("four")
    assert host.told == []
    assert host.suffer("five")
    assert host.told == ["3 jobs in a row met a fault of this host, the last: it broke"]
    host.wait(1.25)
    assert host.told[1:] == [""]


def test_a_probe_that_cannot_tell_speaks_against_nobody(host: Host) -> None:
    host.trouble = False
    assert not host.suffer()
    assert host.told == []
    host.wait(REST_SECONDS + 0.25)
    assert host.door.is_open


def test_a_probe_that_cannot_tell_leaves_a_sick_worker_sick(host: Host) -> None:
    host.trouble = FULL
    host.suffer()
    host.trouble = False
    host.wait(60)
    assert not host.door.is_open


def test_a_probe_that_hangs_makes_the_worker_sick_and_holds_nobody_up(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitness, "MAX_PROBE_SECONDS", 0.05)
    disk_answers = threading.Event()
    host.trouble = disk_answers
    assert not host.suffer()
    assert host.told == ["a probe of this host has not ended after 0.05 s"]
    disk_answers.set()
    host.wait(60)
    assert host.told[1:] == [""]


def test_what_only_a_fresh_process_cures_is_not_probed(host: Host) -> None:
    assert not host.suffer(is_final=True)
    host.wait(600)
    assert host.num_probes == 0
    assert host.told == ["it broke"]
    assert not host.door.is_open


def test_what_is_of_the_host_is_known_behind_a_librarys_error() -> None:
    class LibraryError(Exception):
        pass

    try:
        try:
            raise OSError(24, "Too many open files")
        except OSError as error:
            raise LibraryError("could not connect") from error
    except LibraryError as wrapped:
        found = host_fault_of(wrapped)
    assert found is not None
    assert found.kind == "Too many open files"
    assert host_fault_of(LibraryError("could not connect")) is None
    assert host_fault_of(RuntimeError("can't start new thread")) is not None
    assert host_fault_of(RuntimeError("anything else")) is None
    assert host_fault_of(MemoryError()) is None
