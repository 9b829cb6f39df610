"""Hands outcomes to the settlement through any outage: what Redis does not take is kept until it does, on disk or,
where that fails, in memory.
"""

import fcntl
import hashlib
import logging
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Self

from pydantic import ValidationError
from redis import Redis
from redis.exceptions import RedisError

from keye.config.connection import PATIENCE_SECONDS, Patience, passes
from keye.config.contract import Report
from keye.config.key_prefix import prefix_of
from keye.config.outcome import JobFailure, Outcome
from keye.worker.leases.claims import Claimed
from keye.worker.leases.job_lease import new_token
from keye.worker.private_folder import PrivateFolder, is_own_file
from keye.worker.results.settlement import OutcomeTooLarge, Settlement
from keye.worker.telemetry import metrics

log = logging.getLogger(__name__)


class Verdict(Report):
    """An outcome, the claim that it was reached under, and the events (JSON) that go before the last."""

    lease: Claimed
    outcome: Outcome
    last_events: tuple[str, ...] = ()


# How long after its last byte a file under way is one of a dead process: those of 0.2 are not locked while written.
_LEFT_SECONDS = 10.0
# As `new_token` draws them. A file of any other name is not ours to remove.
_TOKEN = re.compile("[0-9a-f]{16}")
_FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class Spool:
    """A file for each outcome, named by its claim's token, shared by all workers of a host that have the same Redis.

    It is bounded, and its disk may fail: what it does not take stays in memory, and the log says so. What is in there
    and cannot be read is told of once and passed over. Whoever else is on the host, it reads and removes no files but
    its own: in a folder of this user alone, by its descriptor.
    """

    def __init__(self, folder: Path, max_files: int = 10_000, max_bytes: int = 2**28) -> None:
        """Nothing is made yet."""
        self.folder = folder
        self.max_files = max_files
        self.max_bytes = max_bytes
        self._private = PrivateFolder(folder, "KEYE_SPOOL_FOLDER")
        self._told: set[str] = set()
        # Delivered, and not to be removed.
        self._delivered: set[str] = set()

    @classmethod
    def of(cls, redis: Redis, folder: Path) -> Self:
        """The part of `folder` that is for this Redis: another one would refuse every outcome."""
        options = redis.connection_pool.connection_kwargs
        address = repr([options.get(name) for name in ("host", "port", "path", "db")]) + prefix_of(redis)
        return cls(folder / hashlib.sha256(address.encode()).hexdigest()[:16])

    def make(self) -> None:
        """At the start, before another user can be first. A fault is told of, and ends no worker."""
        try:
            os.close(self._private.open(make=True))
        except OSError as fault:
            log.warning("outcomes that Redis does not take are kept in memory only: %s", fault)

    def keep(self, verdict: Verdict) -> bool:
        """In one step: a process that dies in the middle leaves nothing that is read. Says whether it is kept."""
        content = verdict.model_dump_json().encode()
        try:
            try:
                self._write(verdict.lease.token, content)
            except FileNotFoundError:
                # Somebody tidied the folder away just now.
                self._write(verdict.lease.token, content)
        except OSError as fault:
            log.warning("job %s: outcome is kept in memory only: %s", verdict.lease.job_id, fault)
            return False
        return True

    def waiting(self) -> Iterator[Verdict]:
        """All that is kept. What is no outcome is told of and dropped, and its job runs again."""
        with ExitStack() as opened:
            try:
                folder = opened.enter_context(self._opened(make=False))
                # Before the first is handed out: a scan takes a descriptor of its own.
                with os.scandir(folder) as scan:
                    names = [entry.name for entry in scan]
            except FileNotFoundError:
                return
            except OSError as fault:
                self._tell("", logging.WARNING, "what is kept for Redis cannot be looked at: %s", fault)
                return
            # Whatever is gone, or right again, is told of anew when it comes back.
            self._told.intersection_update(names)
            self._delivered.intersection_update(Path(name).stem for name in names)
            for name in names:
                token, suffix = os.path.splitext(name)
                if suffix == ".partial":
                    _remove_if_left(folder, name)
                elif suffix != ".json":
                    continue
                elif token in self._delivered:
                    self.drop(token)
                elif (verdict := self._read(folder, name)) is not None:
                    yield verdict

    def drop(self, token: str) -> None:
        try:
            with self._opened(make=False) as folder:
                os.unlink(f"{token}.json", dir_fd=folder)
        except (FileNotFoundError, FileExistsError):
            return
        except OSError as fault:
            self._delivered.add(token)
            self._tell(f"{token}.json", logging.WARNING, "an outcome stays on disk, where it does no harm: %s", fault)

    @contextmanager
    def _opened(self, *, make: bool) -> Iterator[int]:
        folder = self._private.open(make=make)
        try:
            yield folder
        finally:
            os.close(folder)

    def _write(self, token: str, content: bytes) -> None:
        with self._opened(make=True) as folder:
            with os.scandir(folder) as scan:
                sizes = [size for entry in scan if (size := _size_of(entry)) is not None]
            if len(sizes) >= self.max_files or sum(sizes) + len(content) > self.max_bytes:
                raise OSError(
                    f"{self._private.place} holds {len(sizes)} outcomes in {sum(sizes)} bytes, the limits are "
                    f"{self.max_files} and {self.max_bytes}"
                )
            under_way = f"{token}.partial"
            # What an earlier try of ours has left.
            with suppress(FileNotFoundError):
                os.unlink(under_way, dir_fd=folder)
            handle = os.open(under_way, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FLAGS, 0o600, dir_fd=folder)
            try:
                with open(handle, "wb") as file:
                    # Nobody takes it for a dead process' own. Some network disks know no locks.
                    with suppress(OSError):
                        fcntl.flock(file, fcntl.LOCK_EX)
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                    os.rename(under_way, f"{token}.json", src_dir_fd=folder, dst_dir_fd=folder)
            except BaseException:
                with suppress(OSError):
                    os.unlink(under_way, dir_fd=folder)
                raise

    def _read(self, folder: int, name: str) -> Verdict | None:
        path = self._private.place / name
        try:
            # A pipe would be waited for; a link is no outcome of ours.
            with open(os.open(name, os.O_RDONLY | _FLAGS, dir_fd=folder), "rb") as file:
                found = os.fstat(file.fileno())
                if not is_own_file(found) or found.st_size > self.max_bytes:
                    raise OSError(f"it is no file of this user's alone, or has more than {self.max_bytes} bytes")
                return Verdict.model_validate_json(file.read(self.max_bytes))
        except FileNotFoundError:
            # Delivered by another worker meanwhile.
            return None
        except OSError as fault:
            self._tell(name, logging.ERROR, "%s cannot be read, passed over: %s", path, fault)
        except ValidationError as fault:
            token = name.removesuffix(".json")
            if _TOKEN.fullmatch(token):
                self._tell(name, logging.ERROR, "%s is no outcome of this release, dropped: %s", path, fault)
                self.drop(token)
            else:
                self._tell(name, logging.ERROR, "%s is no outcome and not named as one, it stays where it is", path)
        return None

    def _tell(self, name: str, level: int, text: str, *facts: object) -> None:
        if name not in self._told:
            self._told.add(name)
            log.log(level, text, *facts)


def _size_of(entry: "os.DirEntry[str]") -> int | None:
    """None of what is no file, or has just been delivered."""
    try:
        return entry.stat(follow_symlinks=False).st_size if entry.is_file(follow_symlinks=False) else None
    except FileNotFoundError:
        return None


def _remove_if_left(folder: int, name: str) -> None:
    """A file that a process began to write and died over."""
    with suppress(OSError), open(os.open(name, os.O_RDWR | _FLAGS, dir_fd=folder), "rb") as file:
        found = os.fstat(file.fileno())
        if is_own_file(found) and time.time() - found.st_mtime > _LEFT_SECONDS:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(name, dir_fd=folder)


class Outbox:
    """`settle` is for who ran the job, `deliver` for whoever comes after an outage, in this process or the next.

    What neither Redis nor the disk takes is of no more jobs than run at a time: none begins while Redis is away.
    """

    def __init__(self, settlement: Settlement, spool: Spool, patience: Patience) -> None:
        self._settlement = settlement
        self._spool = spool
        self._patience = patience
        # By the token of their claim.
        self._in_memory: dict[str, Verdict] = {}

    def settle(
        self,
        lease: Claimed,
        outcome: Outcome,
        last_events: Sequence[str] = (),
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> bool:
        """As `Settlement.settle`, but waits out an outage of Redis, and raises its fault once patience ends.

        The caller may then go on with other work: the outcome stays on disk, or in memory, to be delivered.
        """
        settle = partial(self._settlement.settle, lease, outcome, last_events, new_token())
        try:
            return settle()
        except RedisError as fault:
            if not passes(fault):
                raise
        verdict = Verdict(lease=lease, outcome=outcome, last_events=tuple(last_events))
        is_on_disk = self._spool.keep(verdict)
        try:
            is_written = self._patience.wait_out(settle, f"settling job {lease.job_id}", patience_seconds)
        except OutcomeTooLarge:
            self._spool.drop(lease.token)
            raise
        except RedisError as fault:
            if not is_on_disk and passes(fault):
                self._in_memory[lease.token] = verdict
            raise
        self._spool.drop(lease.token)
        return is_written

    def deliver(self) -> None:
        """Write what is kept, where its claim still counts. Raises the fault of a Redis that is away.

        What is too large for it ends its job as failed: tried for ever, it would hold up the others.
        """
        for verdict in chain(self._in_memory.copy().values(), self._spool.waiting()):
            lease, outcome = verdict.lease, verdict.outcome
            try:
                is_written = self._settlement.settle(lease, outcome, verdict.last_events)
            except OutcomeTooLarge as fault:
                log.error("job %s: %s", lease.job_id, fault)
                outcome = fault.failure
                is_written = self._settlement.settle(lease, outcome, verdict.last_events)
            if is_written:
                log.info("job %s: outcome that was kept is written, %s", lease.job_id, outcome.state)
            else:
                log.warning("job %s: outcome that was kept is discarded, the job went on without it", lease.job_id)
            self._in_memory.pop(lease.token, None)
            self._spool.drop(lease.token)

    def close(self) -> None:
        """The process ends: what is in memory goes on disk, if that takes it now. What is lost is told and counted."""
        for verdict in self._in_memory.values():
            if not self._spool.keep(verdict):
                outcome, job_id = verdict.outcome, verdict.lease.job_id
                code = outcome.code if isinstance(outcome, JobFailure) else ""
                metrics.OUTCOMES_LOST.inc()
                log.error(
                    "job %s: its outcome is lost, %s%s: neither Redis nor %s took it before this process ended. The "
                    "job runs again once its lease ends.",
                    *(job_id, outcome.state, code and f" ({code})", self._spool.folder),
                    extra={"job_id": job_id, "attempt": outcome.attempts, "code": code},
                )
        self._in_memory.clear()
