"""How far a job is, as one snapshot."""

from typing import Any, Self

from pydantic import ValidationError

from keye.config.codes import JobState, Stage
from keye.config.contract import Report
from keye.config.event import FramesDecoded, StageStarted, TextGenerated, read_event


class Progress(Report):
    """`stage` and all counts are those of the newest `attempt`; `stage` is None once the job has ended.

    Of all its videos together `frames_done` of `frames_total` are decoded (None before the first is begun), and
    `num_tokens` are written. `place` is how many queued jobs go before it, None while it is not in the queue.
    `seconds_left` is an estimate from how long the fleet's newest hundred jobs ran; None where nothing tells.
    `has_worker` is False while no worker with its model loaded is alive.
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
                case TextGenerated(attempt=of_attempt) if of_attempt == attempt:
                    stage = Stage.GENERATE if stage is Stage.OPEN else stage
                    num_tokens = event.num_tokens if num_tokens is None else num_tokens
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
