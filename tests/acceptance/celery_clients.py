"""Celery's own clients, which are not ours, in tests of docs/celery.md: what the page prints, and what they send."""

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import celery
import pytest
from celery import Celery
from celery.canvas import Signature
from celery.result import AsyncResult

from keye.config.faults import JobFailed
from keye.config.topology import ANALYZE_TASK, QUEUE
from tests.support.pages import printed as printed_by

PAGE = "docs/celery.md"
printed = partial(printed_by, PAGE)
PRINTED_URL = "redis://127.0.0.1:6379/0"
OTHERS_PYTHON = f"""
import sys
sys.path.append({str(Path(celery.__file__).parents[1])!r})
from importlib.util import find_spec
assert not any(map(find_spec, ("config", "producer", "worker")))
"""


def run_elsewhere(program: str, redis_url: str) -> str:
    """What a printed program prints where there are Celery and its packages, but none of ours."""
    code = OTHERS_PYTHON + program.replace(PRINTED_URL, redis_url)
    command = [sys.executable, "-I", "-S", "-W", "error", "-c", code]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def job(prompt: str, **fields: Any) -> dict[str, Any]:
    return {"job": {"prompt": prompt, **fields}}


def send(app: Celery, prompt: str, **options: Any) -> AsyncResult:
    return app.send_task(ANALYZE_TASK, kwargs=job(prompt), queue=QUEUE, **options)


def ask(app: Celery, prompt: str) -> Signature:
    return app.signature(ANALYZE_TASK, kwargs=job(prompt), queue=QUEUE, immutable=True)


def failure_of(task: AsyncResult) -> JobFailed:
    with pytest.raises(JobFailed) as failed:
        task.get(timeout=60)
    assert task.state == "FAILURE"
    return failed.value
