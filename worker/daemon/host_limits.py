"""What the host allows a process of ours: its open files, raised as far as they may be."""

import logging
import resource
import sys

# What 256 jobs at a time (KEYE_CONCURRENCY) need, and few enough for programs that close whatever number there could be
# when they are started: with a hard limit of 2^30 that takes them minutes.
MAX_OPEN_FILES = 2**16

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
