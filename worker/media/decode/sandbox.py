"""What a decoder child may not do: outlive its worker, reach the network, write files. Linux only.

What it may take for one medium: `allowance`.
"""

import ctypes
import errno
import os
import platform
import resource
import signal
import struct
from contextlib import suppress

NICENESS = 5

_PR_SET_PDEATHSIG = 1
_PR_SET_SECCOMP = 22
_PR_SET_NO_NEW_PRIVS = 38

_SECCOMP_MODE_FILTER = 2
_REFUSE, _ALLOW = 0x00050000 | errno.EPERM, 0x7FFF0000

# By machine: what the kernel calls it (linux/audit.h), and the number of its system call `socket`.
_MACHINES = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}
_IO_URING_SETUP = 425  # of every machine; its rings make sockets too
_FIRST_X32 = 0x40000000  # x86_64 calls by their other numbers

_libc = ctypes.CDLL(None, use_errno=True)


class _FilterProgram(ctypes.Structure):
    _fields_ = (("num_steps", ctypes.c_ushort), ("steps", ctypes.c_char_p))


def confine(parent_pid: int) -> None:
    """Confine this process for good. Call it while it has one thread."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:  # it died before the line above
        os.kill(os.getpid(), signal.SIGKILL)
    _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if can_refuse_sockets():
        _refuse_sockets()
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Where memory runs out all the same, the kernel ends a decoder before the worker; where /proc is hidden or read
    # only it chooses by size. Many decode for one engine, and one that waits for a core makes all jobs wait.
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("1000")
    with suppress(OSError):
        os.nice(NICENESS)


def can_refuse_sockets() -> bool:
    """Whether a child is kept off the network here: the kernel has filters, and they are written for this machine."""
    # It trips over the missing filter where it takes any (seccomp(2)); nothing is changed.
    _libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, None, 0, 0)
    return ctypes.get_errno() == errno.EFAULT and platform.machine() in _MACHINES


def _refuse_sockets() -> None:
    """From now on the kernel makes no socket for this process, for root or any user, in a container or not.

    A filter of seccomp(2), since leaving the network by unshare(2) is what most containers forbid.
    """
    machine, socket = _MACHINES[platform.machine()]
    load, jump_if_equal, jump_if_at_least, end = 0x20, 0x15, 0x35, 0x06
    # Each step: operation, steps to skip if true, if false, operand. The call's number lies at 0, its machine at 4.
    steps = (
        (load, 0, 0, 4),
        (jump_if_equal, 0, 5, machine),
        (load, 0, 0, 0),
        (jump_if_at_least, 3, 0, _FIRST_X32),
        (jump_if_equal, 2, 0, socket),
        (jump_if_equal, 1, 0, _IO_URING_SETUP),
        (end, 0, 0, _ALLOW),
        (end, 0, 0, _REFUSE),
    )
    program = _FilterProgram(len(steps), b"".join(struct.pack("HBBI", *step) for step in steps))
    if _libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "the kernel takes no filter")
