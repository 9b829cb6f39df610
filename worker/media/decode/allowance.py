"""What a decoder child may take for one medium, memory and CPU time: set and measured by the worker, Linux only.

The child itself has no say in it. What it may never take, whatever is set here: `sandbox`.
"""

import math
import resource
import time
from pathlib import Path

# Code, stacks and buffers of the largest video the pixel limit allows (8K HEVC holds some thirty frames).
WORKING_BYTES = 4 * 2**30
MAX_CPU_SECONDS = 1800

# Between two media: to tidy up, and to wait.
_IDLE_CPU_SECONDS = 1
# The kernel's signal comes within a second of CPU time. One that has taken so much more does not heed it.
_GRACE_SECONDS = 2


class Allowance:
    """Of the child `pid`, which its worker has not waited for yet. Each call takes microseconds.

    A medium may take half of the hard limit on CPU time, which may be the host's, whatever those before it took.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        # What clock_getcpuclockid(3) returns, which Python lacks: the kernel's clock of all threads of a process.
        self._clock = ~pid << 3 | 2
        self._ends_at = math.inf
        self._own_bytes = 0
        self.cpu_seconds = 0

    def set_ceiling(self, pixel_bytes: int) -> None:
        """Once it has come up: the hard limits, which no child can raise. Its code, of which torch is gigabytes, counts
        as its own."""
        num_pages = int(Path(f"/proc/{self._pid}/statm").read_text().split()[0])
        self._own_bytes = num_pages * resource.getpagesize()
        for which, most in (
            (resource.RLIMIT_AS, self._own_bytes + WORKING_BYTES + pixel_bytes),
            (resource.RLIMIT_CPU, math.ceil(self._cpu_seconds_used()) + 2 * MAX_CPU_SECONDS),
        ):
            soft, hard = self._limits(which)
            if hard == resource.RLIM_INFINITY or hard > most:
                resource.prlimit(self._pid, which, (most if soft == resource.RLIM_INFINITY else min(soft, most), most))

    def grant(self, pixel_bytes: int, cpu_seconds: int) -> None:
        """For the next medium: memory besides its pixels, and CPU time from now on. Raises `OSError` where it ended.

        `cpu_seconds` says afterwards how much that is.
        """
        self._limit(resource.RLIMIT_AS, self._own_bytes + WORKING_BYTES + pixel_bytes)
        self.cpu_seconds = min(cpu_seconds, self._most_cpu_seconds())
        self._let_run_for(self.cpu_seconds)

    def end(self) -> None:
        """The medium's: one that was taken over takes no more for itself while it waits."""
        self._let_run_for(_IDLE_CPU_SECONDS)

    @property
    def is_overdrawn(self) -> bool:
        return self._cpu_seconds_used() > self._ends_at + _GRACE_SECONDS

    def suffices_for_another(self) -> bool:
        """Whether the next medium may have the most that one may have here."""
        _, hard = self._limits(resource.RLIMIT_CPU)
        return hard == resource.RLIM_INFINITY or hard - self._cpu_seconds_used() > self._most_cpu_seconds()

    def _most_cpu_seconds(self) -> int:
        _, hard = self._limits(resource.RLIMIT_CPU)
        return MAX_CPU_SECONDS if hard == resource.RLIM_INFINITY else min(MAX_CPU_SECONDS, hard // 2)

    def _let_run_for(self, cpu_seconds: int) -> None:
        self._ends_at = math.ceil(self._cpu_seconds_used()) + cpu_seconds
        # The kernel ends the process at the soft limit, with SIGXCPU; at the hard one with SIGKILL, as for want of
        # memory.
        self._limit(resource.RLIMIT_CPU, self._ends_at, below_hard=1)

    def _limit(self, which: int, soft: int, below_hard: int = 0) -> None:
        _, hard = self._limits(which)
        soft = soft if hard == resource.RLIM_INFINITY else min(soft, max(0, hard - below_hard))
        resource.prlimit(self._pid, which, (soft, hard))

    def _limits(self, which: int) -> tuple[int, int]:
        return resource.prlimit(self._pid, which)

    def _cpu_seconds_used(self) -> float:
        """Of one that has ended, all it took."""
        return time.clock_gettime(self._clock)
