"""What goes wrong with the spool, or lies in it, fails no job and holds up no outcome; and is told of once."""

import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from redis import Redis

from keye.config.connection import Patience
from keye.worker.leases.job_lease import LeaseStore
from keye.worker.results.outbox import Outbox, Spool, Verdict
from keye.worker.results.settlement import Settlement
from tests.support.conditions import eventually
from tests.support.leased_jobs import a_failure, a_job, claim, record
from tests.support.mounts import mounted


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    spool = Spool(tmp_path / "spool")
    spool.folder.mkdir()
    return spool


@pytest.fixture
def verdict(store: LeaseStore) -> Verdict:
    lease = claim(store, a_job())
    return Verdict(lease=lease, outcome=a_failure(lease))


@contextmanager
def no_more_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def put_socket(path: Path) -> None:
    handle = os.open(path.parent, os.O_PATH)
    with socket.socket(socket.AF_UNIX) as server:
        # A short name for it.
        server.bind(f"/proc/self/fd/{handle}/{path.name}")
    os.close(handle)


PUT: dict[str, Callable[[Path], object]] = {
    "a folder": lambda path: (path / "of others").mkdir(parents=True),
    "a pipe": os.mkfifo,
    "a socket": put_socket,
    "a link": lambda path: path.symlink_to("/dev/zero"),
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("name", ["X.json", "X.partial", "X"])
@pytest.mark.parametrize("put", PUT)
def test_what_is_no_outcome_is_passed_over_and_told_of_once(
    redis: Redis,
    settlement: Settlement,
    spool: Spool,
    verdict: Verdict,
    caplog: pytest.LogCaptureFixture,
    put: str,
    name: str,
) -> None:
    outbox = Outbox(settlement, spool, Patience())
    PUT[put](spool.folder / name)
    assert spool.keep(verdict)
    for _ in range(3):
        outbox.deliver()
    assert "outcome" in record(redis, verdict.lease.job_id)
    told = [each.getMessage() for each in caplog.records if each.levelname in ("WARNING", "ERROR")]
    assert len(told) == (name == "X.json")
    assert all(f"{spool.folder}/X.json cannot be read, passed over" in line for line in told)
    assert os.path.lexists(spool.folder / name)


def test_file_of_more_than_all_outcomes_may_have_is_not_read(
    spool: Spool, verdict: Verdict, caplog: pytest.LogCaptureFixture
) -> None:
    assert spool.keep(verdict)
    (spool.folder / "X.json").touch()
    os.truncate(spool.folder / "X.json", 2**40)
    for _ in range(3):
        assert list(spool.waiting()) == [verdict]
    assert len(caplog.messages) == 1


def test_it_is_told_of_again_when_it_comes_back(spool: Spool, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        (spool.folder / "X.json").mkdir()
        for _ in range(3):
            assert list(spool.waiting()) == []
        (spool.folder / "X.json").rmdir()
        assert list(spool.waiting()) == []
    assert len(caplog.messages) == 2


KILLED = """
import os, sys
from pathlib import Path
from keye.worker.results.outbox import Spool, Verdict

def hang(_):
    print("under way", flush=True)
    sys.stdin.read()

os.fsync = hang
Spool(Path(sys.argv[1])).keep(Verdict.model_validate_json(sys.argv[2]))
"""


def test_what_a_dead_process_left_half_written_is_removed_and_what_is_under_way_is_not(
    spool: Spool, verdict: Verdict
) -> None:
    (spool.folder / "old.partial").write_bytes(b"{")
    os.utime(spool.folder / "old.partial", (0, 0))
    command = [sys.executable, "-c", KILLED, str(spool.folder), verdict.model_dump_json()]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "under way\n"
        (under_way,) = spool.folder.glob(f"{verdict.lease.token}.partial")
        os.utime(under_way, (0, 0))
        assert list(spool.waiting()) == []
        assert list(spool.folder.iterdir()) == [under_way]
        process.send_signal(signal.SIGKILL)
    eventually(lambda: list(spool.waiting()) == list(spool.folder.iterdir()) == [])


def test_what_is_being_written_by_the_release_before_is_left_alone(spool: Spool) -> None:
    (spool.folder / "new.partial").write_bytes(b"{")
    assert list(spool.waiting()) == []
    assert [path.name for path in spool.folder.iterdir()] == ["new.partial"]


def test_full_disk_leaves_nothing_behind_and_the_outcome_is_kept_once_there_is_room(
    store: LeaseStore, spool: Spool, verdict: Verdict, caplog: pytest.LogCaptureFixture
) -> None:
    with mounted(spool.folder, 2**20):
        filler = spool.folder / "filler"
        filler.write_bytes(bytes(2**20))
        assert spool.keep(verdict) is False
        assert "outcome is kept in memory only" in caplog.text
        assert list(spool.folder.iterdir()) == [filler]
        filler.unlink()
        assert spool.keep(verdict) is True
        assert list(spool.waiting()) == [verdict]


def test_without_files_to_open_nothing_is_lost_and_nothing_raised(
    spool: Spool, store: LeaseStore, verdict: Verdict, caplog: pytest.LogCaptureFixture
) -> None:
    lease = claim(store, a_job())
    other = Verdict(lease=lease, outcome=a_failure(lease))
    assert spool.keep(verdict)
    with no_more_files():
        assert spool.keep(other) is False
        for _ in range(3):
            assert list(spool.waiting()) == []
    assert len(caplog.messages) == 2
    assert list(spool.waiting()) == [verdict]
    entries = spool.waiting()
    assert spool.keep(other)
    assert next(entries) in (verdict, other)
    with no_more_files():
        assert list(entries) == []
    assert len(list(spool.waiting())) == 2, "an outcome that cannot be read now is not dropped"


def test_folder_that_vanishes_is_made_again_and_misses_nobody(spool: Spool, verdict: Verdict) -> None:
    shutil.rmtree(spool.folder)
    assert list(spool.waiting()) == []
    spool.drop(verdict.lease.token)
    assert spool.keep(verdict)
    entries = spool.waiting()
    shutil.rmtree(spool.folder)
    assert list(entries) == []


def test_outcome_that_cannot_be_removed_is_delivered_once_and_told_of_once(
    redis: Redis, settlement: Settlement, spool: Spool, verdict: Verdict, caplog: pytest.LogCaptureFixture
) -> None:
    outbox = Outbox(settlement, spool, Patience())
    with mounted(spool.folder):
        assert spool.keep(verdict)
        subprocess.run(["mount", "-o", "remount,ro", spool.folder], check=True)
        for _ in range(3):
            outbox.deliver()
        told = [each.getMessage() for each in caplog.records if each.levelname in ("WARNING", "ERROR")]
        assert ["stays on disk" in line for line in told] == [True]
        subprocess.run(["mount", "-o", "remount,rw", spool.folder], check=True)
        outbox.deliver()
        assert list(spool.folder.iterdir()) == []
    assert "outcome" in record(redis, verdict.lease.job_id)
