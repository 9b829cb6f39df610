"""Turns the process the supervisor started into a Celery worker that cannot outlive it. Knows no model, no queue."""

import ctypes
import os
import signal
import sys
import warnings
from importlib import import_module

from celery.__main__ import main as celery
from celery.exceptions import SecurityWarning


def die_with_parent(parent_pid: int) -> None:
    """However the supervisor ends, by SIGKILL too, this process ends at once and frees its GPU.

    The kernel sees to it, even while native code holds Python's lock.
    """
    pr_set_pdeathsig = 1
    if ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:  # it died before the line above
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    _, parent, *options = sys.argv
    die_with_parent(int(parent))
    # Celery warns root of pickles, which no worker of ours takes.
    warnings.simplefilter("ignore", SecurityWarning)
    # What an operator would type, less the banner; the rest is on the app.
    app = "keye.worker.tasks.celery_app"
    # Here, not by Celery, which puts the working directory first while it imports.
    for module in (app, "keye.worker.tasks.analyze"):
        import_module(module)
    sys.argv = ["celery", "--quiet", "-A", app, "worker", "--pool", "threads", "--loglevel", "INFO", *options]
    celery()
