"""How far a job is, as one snapshot; and all that an operator asks of one job."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Self

from pydantic import ValidationError

from keye.config.codes import ErrorCode, JobState, QueuedAgain, Stage
from keye.config.contract import Report
from keye.config.event import AnswerEnded, FramesDecoded, StageStarted, TextGenerated, read_event
from keye.config.outcome import OUTCOME, JobFailure


class Progress(Report):
    """`stage` and all counts are those of the newest `attempt`; `stage` is None once the job has ended.

    Of all its videos together `frames_done` of `frames_total` are decoded (None before the first is begun), and
    `num_tokens` of all answers are written. `place` is how many queued jobs go before it, None while it is not in
    the queue. `seconds_left` is an estimate from how long the fleet's newest hundred jobs ran; None where nothing
    tells. `has_worker` is False while no worker with its model loaded is alive.
    """

    state: JobState
    stage: Stage | None
    attempt: int
    frames_done: int | None
    frames_total: int | None
    num_tokens: int
    place: int | None
    seconds_left: float | None
    has_worker: bool

    @classmethod
    def of(cls, found: list[Any]) -> Self:
        """From what the script `progress` returns."""
        state, attempts, claimed_at, now, place, mean, seconds, has_worker, *events = found
        state, attempt = JobState(state), int(attempts)
        stage = None if state.is_final else Stage.QUEUED if state is JobState.QUEUED else Stage.OPEN
        frames: dict[int, FramesDecoded] = {}
        num_tokens = None
        for event_json in events:
            try:
                event = read_event(event_json)
            except ValidationError:
                continue
            # The newest first.
            match event:
                case StageStarted(attempt=of_attempt) if of_attempt == attempt and stage is Stage.OPEN:
                    stage = event.stage
                case FramesDecoded(attempt=of_attempt) if of_attempt == attempt:
                    stage = Stage.DECODE if stage is Stage.OPEN else stage
                    frames.setdefault(event.media_index, event)
                case TextGenerated(attempt=of_attempt) | AnswerEnded(attempt=of_attempt) if of_attempt == attempt:
                    stage = Stage.GENERATE if stage is Stage.OPEN else stage
                    if num_tokens is None:
                        of_one = event.num_tokens if isinstance(event, TextGenerated) else 0
                        num_tokens = event.num_tokens_of_all or of_one
        seconds_left = None
        if state.is_final:
            seconds_left = 0.0
        elif has_worker and state is JobState.RUNNING and mean:
            left = float(mean) - (float(now) - float(claimed_at or now))
            seconds_left = left if left > 0 else None
        elif has_worker and place != "" and seconds:
            seconds_left = int(place) * float(seconds) + float(mean)
        return cls(
            state=state,
            stage=stage,
            attempt=attempt,
            frames_done=sum(event.done for event in frames.values()) if frames else None,
            frames_total=sum(event.total for event in frames.values()) if frames else None,
            num_tokens=num_tokens or 0,
            place=None if place == "" else int(place),
            seconds_left=seconds_left,
            has_worker=bool(has_worker),
        )


class JobStatus(Progress):
    """Also who runs it or ran it last (`worker`, host:pid), and `since` when it is in its state, `seconds` ago by now.

    Times are Unix seconds of the server's clock. `reason` is why it is queued again, `due_at` when the next attempt may
    begin. `code`, `message` and `ended_in` (a stage) are those of a job that ended without an answer.
    """

    job_id: str
    submitted_at: float | None
    since: float | None
    seconds: float | None
    worker: str | None
    reason: QueuedAgain | None = None
    due_at: float | None = None
    ended_in: Stage | None = None
    code: ErrorCode | None = None
    message: str | None = None

    @classmethod
    def of_job(cls, job_id: str, found: list[Any], record: Mapping[str, str]) -> Self:
        """From what the script `progress` returns, and of the record `RECORD_FIELDS`. Raises `ValueError`."""
        progress = Progress.of(found)
        at = {
            name: float(record[name]) if record[name] else None for name in ("submitted_at", "claimed_at", "ended_at")
        }
        told: dict[str, Any] = {"since": at["submitted_at"]}
        if progress.state.is_final:
            told["since"] = at["ended_at"]
            with suppress(ValidationError):
                if isinstance(outcome := OUTCOME.validate_json(record["outcome"]), JobFailure):
                    told |= {"code": outcome.code, "message": outcome.message, "ended_in": outcome.stage}
        elif progress.state is JobState.RUNNING:
            told["since"] = at["claimed_at"]
        else:
            told["due_at"] = record["due_at"] or None
            # The newest event is that of its return, if it was taken before.
            with suppress(ValidationError):
                if found[8:] and isinstance(event := read_event(found[8]), StageStarted):
                    told |= {"since": event.at, "reason": event.reason}
        if told["since"] is not None:
            told["seconds"] = max(0.0, float(found[3]) - told["since"])
        own = {"job_id": job_id, "submitted_at": at["submitted_at"], "worker": record["worker"] or None}
        return cls(**{**dict(progress), "seconds": None, **own, **told})


RECORD_FIELDS = ("state", "submitted_at", "claimed_at", "ended_at", "worker", "due_at", "outcome")
"""All that `JobStatus.of_job` reads."""


def period(seconds: float) -> str:
    """As commands take one (`90s`, `2h`), in the largest unit that it makes one of."""
    size, unit = next(((s, u) for s, u in ((86400, "d"), (3600, "h"), (60, "m")) if seconds >= s), (1, "s"))
    return f"{seconds // size:.0f}{unit}"
