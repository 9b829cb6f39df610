"""What a decoder child may not do, were its medium to take it over: all but decode what it was handed.

Two layers of the kernel's, both for good and for any user, root too, in a container or not: seccomp(2) refuses every
system call but those that decoding takes, Landlock every path. Linux only.

What it may take for one medium: `allowance`.
"""

import ctypes
import errno
import fcntl
import os
import platform
import resource
import signal
import struct
from collections.abc import Iterator
from contextlib import suppress

NICENESS = 5

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_NAME = 15
_PR_SET_SECCOMP = 22
_PR_SET_NO_NEW_PRIVS = 38

_SECCOMP_MODE_FILTER = 2
_SECCOMP_SET_MODE_FILTER = 1
_SECCOMP_FILTER_FLAG_TSYNC = 1

# By machine: what the kernel calls it (linux/audit.h), and the column of its numbers below.
_MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}

# By number on x86_64 and on aarch64 (asm/unistd.h); None where that one has none.
_ALLOWED: dict[str, tuple[int, int | None]] = {
    # The files and the socket it holds. None that makes, finds, cuts or renames one.
    "read": (0, 63),
    "readv": (19, 65),
    "pread64": (17, 67),
    "write": (1, 64),
    "writev": (20, 66),
    "lseek": (8, 62),
    "fstat": (5, 80),
    "close": (3, 57),
    "sendto": (44, 206),
    "sendmsg": (46, 211),
    "recvfrom": (45, 207),
    "recvmsg": (47, 212),
    "poll": (7, None),
    "ppoll": (271, 73),
    # Memory.
    "brk": (12, 214),
    "mmap": (9, 222),
    "mremap": (25, 216),
    "mprotect": (10, 226),
    "madvise": (28, 233),
    "munmap": (11, 215),
    # Threads, which `clone` makes.
    "futex": (202, 98),
    "set_robust_list": (273, 99),
    "rseq": (334, 293),
    "membarrier": (324, 283),
    "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123),
    "getcpu": (309, 168),
    "gettid": (186, 178),
    "getpid": (39, 172),
    # Its own signals.
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132),
    "restart_syscall": (219, 128),
    # Time, and what it used of it.
    "time": (201, None),
    "gettimeofday": (96, 169),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    "nanosleep": (35, 101),
    "times": (100, 153),
    "getrusage": (98, 165),
    "getrandom": (318, 278),
    # Its end.
    "exit": (60, 93),
    "exit_group": (231, 94),
}
# Looked at by an argument.
_CLONE, _CLONE3, _TGKILL, _PRCTL, _FCNTL = (56, 220), (435, 435), (234, 131), (157, 167), (72, 25)
_SECCOMP = (317, 277)

_CLONE_THREAD = 0x00010000
# What a C library asks for when it makes a thread: all memory, files and signals shared, so none of it is a process.
_THREAD_FLAGS = 0x007D0F00

_LANDLOCK_CREATE_RULESET, _LANDLOCK_RESTRICT_SELF = 444, 446  # on every machine
_LANDLOCK_VERSION = 1
# By the version that brought it (linux/landlock.h): the rights to files, to TCP ports, and to others' processes.
_RIGHTS_TO_FILES = ((1, 0x1FFF), (2, 0x2000), (3, 0x4000), (5, 0x8000))
_RIGHTS_TO_PORTS = ((4, 0x3),)
_SCOPES = ((6, 0x3),)

_libc = ctypes.CDLL(None, use_errno=True)


class _FilterProgram(ctypes.Structure):
    _fields_ = (("num_steps", ctypes.c_ushort), ("steps", ctypes.c_char_p))


def hide_memory() -> None:
    """Of a process that holds secrets: nobody of its user may read its memory, its environment or its handles, or trace
    it. Lasts until it runs another program. It leaves no core dump either."""
    _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def die_with_parent(parent_pid: int) -> None:
    """However the thread that started this process ends, this ends at once, even while native code holds Python's lock:
    the kernel sees to it."""
    if _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:  # it died before the line above
        os.kill(os.getpid(), signal.SIGKILL)


def confine(parent_pid: int) -> None:
    """Confine this process for good: it ends with the thread that started it, and imports nothing from now on."""
    die_with_parent(parent_pid)

    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Where memory runs out all the same, the kernel ends a decoder before the worker; where /proc is hidden or read
    # only it chooses by size. Many decode for one engine, and one that waits for a core makes all jobs wait.
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("1000")
    with suppress(OSError):
        os.nice(NICENESS)
    os.environ.clear()
    num_threads = len(os.listdir("/proc/self/task"))
    _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if version := _landlock_version():
        _refuse_paths(version)
    if _has_filters():
        _refuse_calls(num_threads)


def missing_layers() -> Iterator[str]:
    """What confines children elsewhere and not on this kernel, for people."""
    if not _has_filters():
        yield "no seccomp filters for this machine"
    if not _landlock_version():
        yield "no Landlock"


def _has_filters() -> bool:
    # It trips over the missing filter where it takes any (seccomp(2)); nothing is changed.
    _libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, None, 0, 0)
    return ctypes.get_errno() == errno.EFAULT and platform.machine() in _MACHINES


def _landlock_version() -> int:
    """0 where the kernel has none, or does not let us have it."""
    version: int = _libc.syscall(_LANDLOCK_CREATE_RULESET, None, 0, _LANDLOCK_VERSION)
    return max(0, version)


def _refuse_paths(version: int) -> None:
    """No rule allows any: what is open stays open."""
    kinds = (_RIGHTS_TO_FILES, _RIGHTS_TO_PORTS, _SCOPES)
    known = [sum(rights for since, rights in kind if since <= version) for kind in kinds]
    # Older kernels take a longer question than they know, where the rest of it is zero.
    ruleset = struct.pack("=3Q", *known)
    handle = _libc.syscall(_LANDLOCK_CREATE_RULESET, ruleset, len(ruleset), 0)
    if handle < 0 or _libc.syscall(_LANDLOCK_RESTRICT_SELF, handle, 0) != 0:
        raise OSError(ctypes.get_errno(), "Landlock takes no rules")
    os.close(handle)


def _refuse_calls(num_threads: int) -> None:
    """All but those allowed fail with EPERM from now on, in every thread there is. Raises `OSError`."""
    machine, column = _MACHINES[platform.machine()]
    load, jump_if_equal, jump_if_any, end = 0x20, 0x15, 0x45, 0x06
    allow, refuse, lacks = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
    number_at, machine_at, first_at, second_at = 0, 4, 16, 24
    numbers = [number for numbers in _ALLOWED.values() if (number := numbers[column]) is not None]
    # Each step: operation, steps to skip if true, if false, operand.
    steps = [
        (load, 0, 0, machine_at),
        (jump_if_equal, 1, 0, machine),
        (end, 0, 0, refuse),
        (load, 0, 0, number_at),
        *(step for number in numbers for step in ((jump_if_equal, 0, 1, number), (end, 0, 0, allow))),
        # Its flags lie in memory, where a filter cannot look. A C library that is told so asks for clone.
        *((jump_if_equal, 0, 1, _CLONE3[column]), (end, 0, 0, lacks)),
        *((jump_if_equal, 0, 5, _CLONE[column]), (load, 0, 0, first_at)),
        *((jump_if_any, 2, 0, ~_THREAD_FLAGS & 0xFFFFFFFF), (jump_if_any, 0, 1, _CLONE_THREAD)),
        *((end, 0, 0, allow), (end, 0, 0, refuse)),
        # To end itself (abort), to give a thread its name, and to map memory, for which Python copies the handle.
        *((jump_if_equal, 0, 3, _TGKILL[column]), (load, 0, 0, first_at)),
        *((jump_if_equal, 0, 1, os.getpid()), (end, 0, 0, allow)),
        *((jump_if_equal, 0, 3, _PRCTL[column]), (load, 0, 0, first_at)),
        *((jump_if_equal, 0, 1, _PR_SET_NAME), (end, 0, 0, allow)),
        *((jump_if_equal, 0, 3, _FCNTL[column]), (load, 0, 0, second_at)),
        *((jump_if_equal, 0, 1, fcntl.F_DUPFD_CLOEXEC), (end, 0, 0, allow)),
        (end, 0, 0, refuse),
    ]
    program = _FilterProgram(len(steps), b"".join(struct.pack("HBBI", *step) for step in steps))
    at_it = ctypes.byref(program)
    if _libc.syscall(_SECCOMP[column], _SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_TSYNC, at_it) == 0:
        return
    # What systemd calls @system-service has no seccomp(2), but this, which is for the thread that calls it.
    if num_threads > 1 or _libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, at_it, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"the kernel takes no filter for {num_threads} threads")
