"""Included in a worker, this has whatever it opens from its first job on get numbers that `select` cannot take."""

import os
import select
from typing import Any

from celery.signals import worker_ready

import tests.acceptance.echo_engine  # noqa: F401


@worker_ready.connect
def hoard(**_: Any) -> None:
    last = max(os.open(os.devnull, os.O_RDONLY) for _ in range(1100))
    try:
        select.select([last], [], [], 0)
    except ValueError:
        return
    raise AssertionError("select takes more than it did")
