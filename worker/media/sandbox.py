"""What a decoder child may not do: outlive its worker, reach the network, write files, take all memory or time.

Limits are against files that break decoders. Linux only, as `guard` is.
"""

import ctypes
import os
import resource
import signal

# Code, stacks and buffers of the largest video the pixel limit allows (8K HEVC holds some thirty frames).
WORKING_BYTES = 4 * 2**30
MAX_CPU_SECONDS = 1800

_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38
_CLONE_NEWUSER = 0x10000000
_CLONE_NEWNET = 0x40000000

_libc = ctypes.CDLL(None, use_errno=True)


def confine(parent_pid: int) -> None:
    """Confine this process for good. Call it while it has one thread."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:  # it died before the line above
        os.kill(os.getpid(), signal.SIGKILL)
    _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    # Root may leave the network by itself, others only inside a namespace of users. Where the kernel or a container
    # forbids both, nothing here opens addresses anyway.
    if _libc.unshare(_CLONE_NEWNET) != 0:
        _libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Where memory runs out all the same, the kernel ends a decoder before the worker.
    with open("/proc/self/oom_score_adj", "w") as score:
        score.write("1000")


def allow(pixel_bytes: int) -> None:
    """What the next medium may take: memory besides its pixels, and a new measure of CPU time."""
    resource.setrlimit(resource.RLIMIT_AS, (WORKING_BYTES + pixel_bytes, resource.RLIM_INFINITY))
    usage = resource.getrusage(resource.RUSAGE_SELF)
    used = usage.ru_utime + usage.ru_stime
    # The kernel ends the process at the soft limit, with SIGXCPU.
    resource.setrlimit(resource.RLIMIT_CPU, (int(used) + MAX_CPU_SECONDS, resource.RLIM_INFINITY))
