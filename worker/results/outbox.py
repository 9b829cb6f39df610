"""Hands outcomes to the settlement through any outage: what Redis does not take is kept until it does, on disk or,
where that fails, in memory.
"""

import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from stat import S_ISREG
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


@dataclass(frozen=True, slots=True)
class Spool:
    """A file for each outcome, named by its claim's token, shared by all workers of a host that have the same Redis.

    It is bounded, and its disk may fail: what it does not take stays in memory, and the log says so. What is in there
    and cannot be read is told of once and passed over.
    """

    folder: Path
    max_files: int = 10_000
    max_bytes: int = 2**28
    _told: set[str] = field(default_factory=set, init=False, repr=False, compare=False)
    # Delivered, and not to be removed.
    _delivered: set[str] = field(default_factory=set, init=False, repr=False, compare=False)

    @classmethod
    def of(cls, redis: Redis, folder: Path) -> Self:
        """The part of `folder` that is for this Redis: another one would refuse every outcome."""
        options = redis.connection_pool.connection_kwargs
        address = repr([options.get(name) for name in ("host", "port", "path", "db")]) + prefix_of(redis)
        return cls(folder / hashlib.sha256(address.encode()).hexdigest()[:16])

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
        try:
            entries = list(os.scandir(self.folder))
        except FileNotFoundError:
            return
        except OSError as fault:
            self._tell("", logging.WARNING, "what is kept for Redis cannot be looked at: %s", fault)
            return
        # Whatever is gone, or right again, is told of anew when it comes back.
        self._told.intersection_update(entry.name for entry in entries)
        self._delivered.intersection_update(Path(entry).stem for entry in entries)
        for entry in entries:
            path = Path(entry)
            if path.suffix == ".partial":
                _remove_if_left(path)
            elif path.suffix != ".json":
                continue
            elif path.stem in self._delivered:
                self.drop(path.stem)
            else:
                try:
                    yield Verdict.model_validate_json(self._read(path))
                except FileNotFoundError:
                    # Delivered by another worker meanwhile.
                    continue
                except OSError as fault:
                    self._tell(path.name, logging.ERROR, "%s cannot be read, passed over: %s", path, fault)
                except ValidationError as fault:
                    self._tell(path.name, logging.ERROR, "%s is no outcome of this release, dropped: %s", path, fault)
                    self.drop(path.stem)

    def drop(self, token: str) -> None:
        try:
            self._path(token).unlink()
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as fault:
            self._delivered.add(token)
            self._tell(f"{token}.json", logging.WARNING, "an outcome stays on disk, where it does no harm: %s", fault)

    def _write(self, token: str, content: bytes) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.folder.stat().st_uid != os.geteuid():
            raise PermissionError(f"{self.folder} belongs to another user, set KEYE_SPOOL_FOLDER")
        sizes = [size for entry in os.scandir(self.folder) if (size := _size_of(entry)) is not None]
        if len(sizes) >= self.max_files or sum(sizes) + len(content) > self.max_bytes:
            raise OSError(
                f"{self.folder} holds {len(sizes)} outcomes in {sum(sizes)} bytes, the limits are "
                f"{self.max_files} and {self.max_bytes}"
            )
        under_way = self._path(token).with_suffix(".partial")
        try:
            with under_way.open("wb") as file:
                # Nobody takes it for a dead process' own. Some network disks know no locks.
                with suppress(OSError):
                    fcntl.flock(file, fcntl.LOCK_EX)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                under_way.rename(self._path(token))
        except BaseException:
            with suppress(OSError):
                under_way.unlink()
            raise

    def _read(self, path: Path) -> bytes:
        # A pipe would be waited for; a link is no outcome of ours.
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            found = os.fstat(handle)
            if not S_ISREG(found.st_mode) or found.st_size > self.max_bytes:
                raise OSError(f"it is no file, or has more than {self.max_bytes} bytes")
            with open(handle, "rb", closefd=False) as file:
                return file.read()
        finally:
            os.close(handle)

    def _tell(self, name: str, level: int, text: str, *facts: object) -> None:
        if name not in self._told:
            self._told.add(name)
            log.log(level, text, *facts)

    def _path(self, token: str) -> Path:
        return self.folder / f"{token}.json"


def _size_of(entry: "os.DirEntry[str]") -> int | None:
    """None of what is no file, or has just been delivered."""
    try:
        return entry.stat(follow_symlinks=False).st_size if entry.is_file(follow_symlinks=False) else None
    except FileNotFoundError:
        return None


def _remove_if_left(path: Path) -> None:
    """A file that a process began to write and died over."""
    with suppress(OSError), open(os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        found = os.fstat(file.fileno())
        if S_ISREG(found.st_mode) and time.time() - found.st_mtime > _LEFT_SECONDS:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


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
