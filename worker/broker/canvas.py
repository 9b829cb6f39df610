"""What a Celery message asks to be called once its job has ended: `link`, `link_error`, and its place in a canvas;
and what else it asks beside its job.
"""

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Any

from celery import Celery, signature
from celery.app.task import Context
from pydantic import Field

from keye.config.contract import Report
from keye.config.faults import JobFailed
from keye.config.outcome import JobFailure, JobResult
from keye.worker.broker.envelope import MAX_REASON_CHARS, Foreign, Headers, Name, Unreadable, validated

# What a canvas is made of in the end is tasks; signatures of these types hold them in their arguments.
_CONTAINERS = {"group": ("tasks",), "chain": ("tasks",), "chord": ("header", "body")}
# All that Celery's own canvases set. Whatever else could name an exchange, a broker or a way to serialize.
_OPTIONS = {
    *("queue", "task_id", "reply_to", "link", "link_error", "chain", "chord", "group_id", "group_index", "root_id"),
    *("parent_id", "priority", "countdown", "eta", "expires", "retries", "retry_policy", "delivery_mode"),
    *("time_limit", "soft_time_limit", "add_to_parent"),
}


class Canvas(Report):
    """Signatures as Celery writes them; the next of a chain is the last."""

    callbacks: tuple[dict[str, Any], ...] | None = None
    errbacks: tuple[dict[str, Any], ...] | None = None
    chain: tuple[dict[str, Any], ...] | None = None
    chord: dict[str, Any] | None = None
    group: Name | None = None
    group_index: int | None = None
    root_id: Name | None = None

    @classmethod
    def of(cls, embedded: Any, headers: Headers) -> "Canvas | None":
        """None where nothing is to be called, as in any message that `send_task` writes. Raises `Unreadable`."""
        if not embedded or (isinstance(embedded, dict) and not any(embedded.values())):
            return None
        canvas = validated(cls, embedded, "what is to be called")
        if not (canvas.callbacks or canvas.errbacks or canvas.chain or canvas.chord):
            return None
        place = {"group": headers.group, "group_index": headers.group_index, "root_id": headers.root_id}
        return canvas.model_copy(update=place)

    def require(self, allowed: Sequence[str]) -> None:
        """Raises `Unreadable` unless each task of it may be called: a pattern of `queue/task` matches it."""
        chord = () if self.chord is None else (self.chord,)
        patterns = [pattern.partition("/") for pattern in allowed]
        for queue, task in _tasks((*(self.callbacks or ()), *(self.errbacks or ()), *(self.chain or ()), *chord)):
            # Part by part: a queue may have a slash in its name.
            if not any(fnmatchcase(queue, queues) and fnmatchcase(task, tasks) for queues, _, tasks in patterns):
                called = f"{queue[:200]}/{task[:200]}"
                raise Unreadable(f"it asks to call {called!r} afterwards, which KEYE_CELERY_CANVAS does not name")

    def call(self, app: Celery, task_id: str, outcome: JobResult | JobFailure) -> None:
        """Send what follows; each is given the outcome as a dict, in front of its own arguments."""
        as_json = outcome.model_dump(mode="json")
        lineage = {"root_id": self.root_id or task_id, "parent_id": task_id}
        is_result = isinstance(outcome, JobResult)
        for each in (self.callbacks if is_result else self.errbacks) or ():
            signature(each, app=app).apply_async((as_json,), **lineage)
        if is_result and self.chain:
            *rest, following = self.chain
            signature(following, app=app).apply_async((as_json,), chain=rest, **lineage)
        if self.chord is not None:
            request = Context(id=task_id, group=self.group, group_index=self.group_index, chord=self.chord, **lineage)
            ended = ("FAILURE", JobFailed.of(outcome)) if isinstance(outcome, JobFailure) else ("SUCCESS", as_json)
            app.backend.on_chord_part_return(request, *ended)


class _Signature(Foreign):
    task: Name
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = Field(default_factory=dict)
    options: dict[str, Any] = Field(default_factory=dict)
    subtask_type: Name | None = None


def _tasks(signatures: Any) -> Iterator[tuple[str, str]]:
    """Queue and name of every task that these call, one within the other. Raises `Unreadable`."""
    if not isinstance(signatures, list | tuple):
        signatures = [signatures]
    for each in signatures:
        called = validated(_Signature, each, "what is to be called")
        if strange := called.options.keys() - _OPTIONS:
            options = sorted(map(repr, strange))[:5]
            raise Unreadable(f"what is to be called has the options {options}, which are refused")
        queue = called.options.get("queue")
        if called.subtask_type is not None:
            # Celery goes by the type, whatever the name, and gives the options of the whole to each of its tasks.
            holds = _CONTAINERS.get(called.subtask_type)
            if holds is None or queue is not None or not called.kwargs.keys() >= set(holds):
                raise Unreadable("it asks to call a canvas that is no group, chain or chord of tasks with a queue each")
            for name in holds:
                yield from _tasks(called.kwargs[name])
        elif isinstance(queue, str):
            yield queue, called.task
        else:
            raise Unreadable(f"it asks to call {called.task[:200]!r} on no queue: name one by .set(queue=...)")
        for option in ("link", "link_error", "chain", "chord"):
            if called.options.get(option):
                yield from _tasks(called.options[option])


class Asked(Report):
    """Times are Unix seconds of the caller's clock. `refused` says why the job is to be ended unseen."""

    refused: Annotated[str, Field(max_length=2 * MAX_REASON_CHARS)] | None = None
    not_before: float | None = None
    expires_at: float | None = None
    canvas: Canvas | None = None

    def written_into(self, record: Mapping[str, str]) -> dict[str, str]:
        """The fields of a new job's record with these in it."""
        written = dict(record)
        if self.not_before is not None:
            written["due_at"] = repr(self.not_before)
        if self.expires_at is not None:
            written["deadline_at"] = repr(min(self.expires_at, float(written["deadline_at"] or "inf")))
        if self.canvas is not None:
            written["canvas"] = self.canvas.model_dump_json(exclude_none=True)
        return written


NOTHING_ASKED = Asked()
