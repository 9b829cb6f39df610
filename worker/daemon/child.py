"""Turns the process the supervisor started into a Celery worker that cannot outlive it. Knows no model, no queue."""

import ctypes
import os
import signal
import sys
import threading

from celery.__main__ import main as celery


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
    _, parent, *options = sys.argv
    die_with_parent(int(parent))
    # What an operator would type; the rest is on the app.
    app = "worker.tasks.celery_app"
    sys.argv = ["celery", "-A", app, "worker", "--pool", "threads", "--loglevel", "INFO", *options]
    celery()
