"""The outcome as plain Celery readers (`AsyncResult.get`) find it: Celery's own format, written by the settlement.

Celery would read before it writes, and write after the job has ended; settled with the outcome it costs no round trip.
"""

import json
from datetime import UTC, datetime

from keye.config.outcome import JobFailed, JobFailure, JobResult


def result_key(task_id: str) -> str:
    """String that Celery's Redis backend reads, and the channel on which it waits for it."""
    return f"celery-task-meta-{task_id}"


def result_message(task_id: str, outcome: JobResult | JobFailure, outcome_json: str) -> str:
    """What stands under that key; the result of a job that failed is the exception `JobFailed`."""
    if isinstance(outcome, JobResult):
        status, result = "SUCCESS", outcome_json
    else:
        failed = JobFailed.of(outcome)
        told = {"exc_type": "JobFailed", "exc_message": failed.args, "exc_module": JobFailed.__module__}
        status, result = "FAILURE", json.dumps(told)
    done_at = datetime.now(UTC).isoformat()
    meta = json.dumps({"status": status, "traceback": None, "children": [], "date_done": done_at, "task_id": task_id})
    # The outcome is JSON already.
    return f'{meta[:-1]}, "result": {result}}}'
