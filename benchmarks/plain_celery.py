"""What one would write first: a Celery app with Redis as its broker and its backend, and late acks. Answers at once."""

import os
from typing import Any

from celery import Celery

app = Celery("plain", broker=os.environ["KEYE_REDIS_URL"], backend=os.environ["KEYE_REDIS_URL"])
app.conf.update(
    task_acks_late=True,
    worker_prefetch_multiplier=1,
    broker_connection_retry_on_startup=True,
    task_default_queue="plain",
)

RESULT = {
    "kind": "result",
    "job_id": "0f8c0c0e-6d7a-4f5e-9a54-2f3f6c1f7b11",
    "answer": "Hello",
    "reasoning": None,
    "raw_text": "Hello",
    "finish_reason": "stop",
    "usage": {"prompt_tokens": 5, "visual_tokens": 0, "completion_tokens": 5},
    "timings": dict.fromkeys(("queued", "fetch", "decode", "prepare", "generate", "total", "first_token"), 0.01234567),
    "media": [],
    "model": {"name": "echo", "model_type": "echo", "precision": "float32"},
    "worker": {"host": "localhost", "pid": 12345, "device": "none"},
    "attempts": 1,
    "warnings": [],
    "metadata": {},
}


@app.task(name="plain.analyze")
def analyze(sealed: dict[str, Any]) -> dict[str, Any]:
    return RESULT
