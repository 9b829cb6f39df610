"""What the workers of a host say of themselves in files, and what a probe makes of it.

Nothing of Redis: a store that is away is no reason to end a worker. The standard library only: a probe has a fifth of a
second, its own start included.
"""

import fcntl
import json
import os
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from keye.worker.private_folder import PrivateFolder

# A worker beats twice a second from the thread that watches over it; a full collection or native code that keeps
# Python's lock may take some seconds.
HUNG_AFTER_SECONDS = 30.0
# The supervisor says five times a second how its workers are. Nothing of its may take long.
SILENT_AFTER_SECONDS = 15.0

_MAX_SAID_BYTES = 2**20
_FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

# Names the file that a supervised worker beats in.
HEARTBEAT_VARIABLE = "KEYE_HEARTBEAT"
# Its name on this host: cpu, gpu0, gpu1.
NAME_VARIABLE = "KEYE_WORKER_NAME"


class Health(StrEnum):
    """Of one worker process. `waiting` is for its next start."""

    LOADING = "loading"
    READY = "ready"
    SICK = "sick"
    DRAINING = "draining"
    HUNG = "hung"
    WAITING = "waiting"
    GIVEN_UP = "given_up"


class Heartbeat:
    """A worker's own file: its state, and when it last beat (seconds of CLOCK_MONOTONIC). Without a file it is told to
    nobody."""

    def __init__(self, file: str | None) -> None:
        self.state = Health.LOADING
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self._descriptor = None if file is None else os.open(file, flags, 0o600)

    def beat(self) -> None:
        if self._descriptor is not None:
            # One short write in place: no reader finds half of it, no disk need have room for it.
            os.pwrite(self._descriptor, f"{self.state:<10}{time.monotonic():>20.3f}\n".encode(), 0)


class HostFolder:
    """The supervisor's folder below `run_folder`: a file of what its workers are, the heartbeats and their metrics.

    A lock that ends with its holder tells the living from the dead. Raises `OSError` where the folder cannot be had,
    or would not be this user's alone.
    """

    def __init__(self, run_folder: Path) -> None:
        private = PrivateFolder(run_folder, "KEYE_RUN_FOLDER")
        os.close(private.open(make=True))
        for dead in (folder for folder, is_held in _folders(private.place) if not is_held):
            shutil.rmtree(dead, ignore_errors=True)
        self.path = private.place / str(os.getpid())
        # Nobody looks for it by this name: until it is locked it would look dead to the next supervisor.
        made = private.place / f"new-{os.getpid()}"
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir(mode=0o700)
        self._lock = os.open(made / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        made.rename(self.path)
        self.metrics = self.path / "metrics"
        self.metrics.mkdir()
        self.tell({}, is_draining=False)

    def heartbeat_of(self, worker: str) -> Path:
        return self.path / f"{worker}.beat"

    def health_of(self, worker: str) -> Health:
        """Of one that runs. It is loading until it has beaten, and for as long as it says so."""
        try:
            state, beaten_at = self.heartbeat_of(worker).read_text().split()
        except (FileNotFoundError, ValueError):
            return Health.LOADING
        if state != Health.LOADING and time.monotonic() - float(beaten_at) > HUNG_AFTER_SECONDS:
            return Health.HUNG
        return Health(state)

    def forget(self, worker: str) -> None:
        """It has ended: what it beat says nothing of the next one."""
        self.heartbeat_of(worker).unlink(missing_ok=True)

    def tell(self, workers: Mapping[str, Health], *, is_draining: bool) -> None:
        said = {"at": time.monotonic(), "is_draining": is_draining, "workers": workers}
        written = self.path / "workers.new"
        # A full disk ends no supervisor; a probe finds it silent.
        with suppress(OSError):
            written.write_text(json.dumps(said))
            written.replace(self.path / "workers.json")

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


class Verdict(NamedTuple):
    """Live: nothing here is better ended. Ready: at least one worker takes jobs."""

    is_live: bool
    is_ready: bool
    reason: str


def judge(folder: Path) -> Verdict:
    """What a supervisor's folder says."""
    try:
        with open(os.open(folder / "workers.json", os.O_RDONLY | _FLAGS), "rb") as file:
            said = json.loads(file.read(_MAX_SAID_BYTES))
    except (OSError, ValueError) as error:
        return Verdict(False, False, f"the supervisor has not said how its workers are: {error}")
    workers = ", ".join(f"{worker} {health}" for worker, health in said["workers"].items()) or "no worker yet"
    silent_seconds = time.monotonic() - said["at"]
    if silent_seconds > SILENT_AFTER_SECONDS:
        return Verdict(False, False, f"the supervisor has been silent for {silent_seconds:.0f} s; then: {workers}")
    states = set(said["workers"].values())
    is_live = Health.HUNG not in states
    is_ready = is_live and Health.READY in states and not said["is_draining"]
    return Verdict(is_live, is_ready, f"draining: {workers}" if said["is_draining"] else workers)


def judge_host(run_folder: Path) -> Verdict:
    """All supervisors of this user below this run folder together; of all users for root."""
    places = (run_folder, *filter(_is_ours, run_folder.glob("keye-[0-9]*")))
    verdicts = [judge(folder) for place in places for folder, is_held in _folders(place) if is_held]
    if not verdicts:
        return Verdict(False, False, f"no `keye-worker run` of this user is alive in {run_folder} (KEYE_RUN_FOLDER)")
    are_live, are_ready, reasons = zip(*verdicts, strict=True)
    return Verdict(all(are_live), all(are_ready), "; ".join(reasons))


def _folders(place: Path) -> Iterator[tuple[Path, bool]]:
    """Supervisors' folders, and whether each is still held. What another user has put beside them says nothing."""
    for folder in filter(_is_ours, place.glob("[0-9]*")):
        try:
            lock = os.open(folder / "lock", os.O_RDWR | _FLAGS)
        except OSError:
            continue  # it is being removed
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            yield folder, False
        except BlockingIOError:
            yield folder, True
        finally:
            os.close(lock)


def _is_ours(folder: Path) -> bool:
    """A folder, not a link to one."""
    with suppress(OSError):
        found = folder.lstat()
        return stat.S_ISDIR(found.st_mode) and os.geteuid() in (found.st_uid, 0)
    return False
