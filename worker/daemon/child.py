"""Turns the process the supervisor started into a Celery worker that cannot outlive it. Knows no model, no queue."""

import ctypes
import os
import signal
import sys
import threading


def die_with_parent(parent_pid: int) -> None:
    """However the supervisor ends, by SIGKILL too, this process ends at once and frees its GPU.

    On Linux the kernel sees to it, even while native code holds Python's lock. Elsewhere a thread reads the pipe that
    is our stdin; its other end closes with the supervisor.
    """
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        if ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
        if os.getppid() != parent_pid:  # it died before the line above
            os.kill(os.getpid(), signal.SIGKILL)
    else:
        threading.Thread(target=_watch_stdin, name="parent-watch", daemon=True).start()


def _watch_stdin() -> None:
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    parent, *celery_arguments = sys.argv[1:]
    die_with_parent(int(parent))
    from worker.tasks.celery_app import celery_app

    celery_app.start(celery_arguments)
