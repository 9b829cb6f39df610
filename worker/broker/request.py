"""Celery's request of our task, as it is told of to others."""

from typing import Any

from celery.worker.request import Request


class JobRequest(Request):
    def info(self, safe: bool = False) -> dict[str, Any]:
        """What `inspect active` and Flower show: without the job itself, which may hold signed URLs."""
        told: dict[str, Any] = super().info(safe=True)
        return told
