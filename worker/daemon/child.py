"""Turns the process the supervisor started into a Celery worker that cannot outlive it. Knows no model, no queue."""

import sys
import warnings
from importlib import import_module

from celery.__main__ import main as celery
from celery.exceptions import SecurityWarning

from keye.worker.media.decode.sandbox import die_with_parent

if __name__ == "__main__":
    _, parent, *options = sys.argv
    # However the supervisor ends, by SIGKILL too: the GPU is free for the next.
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
