"""What the host allows our processes, held against what jobs need that are under way: open files, threads, disk."""

import logging
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

from keye.config.host import thread_limits
from keye.config.settings import Settings
from keye.worker.daemon.findings import Finding, Severity, ok, warning
from keye.worker.engine.step_plan import StepLimits
from keye.worker.tasks.lookahead import most_unprepared

# What 256 jobs at a time would need, and few enough for programs that close whatever number there could be
# when they are started: with a hard limit of 2^30 that takes them minutes.
MAX_OPEN_FILES = 2**16

# A job has 8 media fetched at once, each in 8 parts where it is large: a file and 8 connections, 9 threads.
FILES_A_JOB = 72
THREADS_A_JOB = 72
# Of a worker that has no job, those of a GPU's driver among them.
FILES_AT_REST = 64
FILES_A_DECODER = 4
THREADS_AT_REST = 64
# Without so many not even a small job gets through.
LEAST = 32
# An outcome that waits for Redis is a file; a worker's metrics are three, and its heartbeat one.
SPOOL_BYTES_A_JOB = 2**20
RUN_BYTES_A_WORKER = 2**20
RUN_FILES_A_WORKER = 8

logger = logging.getLogger(__name__)


def raise_open_files() -> None:
    """Raise the soft limit to the hard one: common soft limits are from days of `select`, which nothing here uses."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max_open_files()
    if _number(soft) < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        logger.debug("The limit on open files is raised from %d to %d", soft, wanted)


def max_open_files() -> int:
    """What this process' limit is, or will be once it is raised."""
    soft, hard = map(_number, resource.getrlimit(resource.RLIMIT_NOFILE))
    return max(soft, min(hard, MAX_OPEN_FILES))


def _number(limit: int) -> int:
    return sys.maxsize if limit == resource.RLIM_INFINITY else limit


def check_host_limits(settings: Settings) -> Iterator[Finding]:
    """A warning where jobs would be given back once all that may be under way are; a fault where none could run."""
    jobs, workers = settings.num_slots, settings.host_workers
    unprepared = min(jobs, most_unprepared(settings.decoders))
    at_rest = FILES_AT_REST + settings.num_decoder_processes * FILES_A_DECODER
    cure = "Raise it (ulimit -Hn, LimitNOFILE= of systemd, --ulimit nofile of docker)"
    yield _count("open files", "the hard limit", max_open_files(), at_rest, FILES_A_JOB, unprepared, cure)

    limits = thread_limits()
    # Nobody's in particular, and so not bounded.
    if os.geteuid() != 0:
        limits["ulimit -u"] = _number(resource.getrlimit(resource.RLIMIT_NPROC)[0])
    name, limit = min(limits.items(), key=lambda each: each[1], default=("no limit", sys.maxsize))
    at_rest = workers * (THREADS_AT_REST + settings.num_decoder_processes + jobs)
    cure = "Raise it (ulimit -u, TasksMax= of systemd, --pids-limit of docker, sysctl)"
    yield _count("threads", name, limit, at_rest, workers * THREADS_A_JOB, unprepared, cure)

    # Whoever has not been in the engine has little to say.
    answered = workers * min(jobs, StepLimits().max_running)
    folders = [
        ("spool", settings.spool_folder, answered * SPOOL_BYTES_A_JOB, workers * jobs),
        ("run", settings.run_folder, workers * RUN_BYTES_A_WORKER, workers * RUN_FILES_A_WORKER),
        # Its bytes are held against KEYE_CACHE_BYTES.
        ("cache", settings.cache_folder, 0, workers * unprepared * FILES_A_JOB),
    ]
    full = [finding for folder in folders if (finding := _lack_of_room(*folder))]
    yield from full or [ok("disk", "spool, run folder and cache have room for what all jobs under way may write")]
    yield ok("/dev/shm", "may be of any size: pixels lie in memory of their own (memfd)")


def _count(subject: str, name: str, limit: int, at_rest: int, a_job: int, jobs: int, cure: str) -> Finding:
    """`a_job` is what one more takes of those that fetch or decode."""
    wanted = at_rest + jobs * a_job
    needs = f"{jobs} jobs that fetch or decode 8 large media each need {wanted}"
    shown = "any number" if limit == sys.maxsize else f"{limit} ({name})"
    if limit >= wanted:
        return ok(subject, f"{shown}; {needs}")
    severity = Severity.FAULT if limit < LEAST else Severity.WARNING
    fitting = (limit - at_rest) // a_job
    lower = f", or lower KEYE_CONCURRENCY to {fitting}." if fitting >= 1 else "."
    return Finding(subject, severity, f"at most {shown}, and {needs}", cure + lower)


def _lack_of_room(name: str, folder: Path, num_bytes: int, num_files: int) -> Finding | None:
    try:
        there = os.statvfs(nearest_place(folder))
    except OSError:
        return None  # what cannot be looked at cannot be written, which is a finding of its own
    free = there.f_bavail * there.f_frsize
    if free < num_bytes:
        found = f"{folder} has room for {free / 2**20:.1f} MiB, and all jobs under way may need {num_bytes / 2**20:.0f}"
    # Some file systems make inodes as they go, and say that there are none.
    elif there.f_files and there.f_favail < num_files:
        found = f"{folder} has {there.f_favail} inodes left, and all jobs under way may need {num_files}"
    else:
        return None
    return warning(
        "disk", found, f"Delete what is not needed there, or set KEYE_{name.upper()}_FOLDER to another disk."
    )


def nearest_place(folder: Path) -> Path:
    """The folder, or what is to be made into the way to it; a link that leads nowhere counts as there."""
    return next(place for place in (folder, *folder.parents) if os.path.lexists(place))
