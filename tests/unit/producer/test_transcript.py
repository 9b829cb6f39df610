"""What a person sees who watches a job."""

import re

from keye.config.codes import JobState, QueuedAgain, Stage
from keye.config.event import Channel, EventsMissing, FramesDecoded, JobEnded, JobEvent, StageStarted, TextGenerated
from keye.producer.transcript import Transcript


def stage(stage: Stage, attempt: int = 1) -> StageStarted:
    return StageStarted(stage=stage, attempt=attempt, at=0)


def text(channel: Channel, text: str, offset: int = 0, num_tokens: int = 1, attempt: int = 1) -> TextGenerated:
    return TextGenerated(channel=channel, text=text, offset=offset, num_tokens=num_tokens, attempt=attempt, at=0)


ENDED = JobEnded(state=JobState.SUCCEEDED, at=0)


def shown(*events: JobEvent | EventsMissing) -> str:
    """Without times of day and without styles."""
    transcript = Transcript()
    whole = "".join(transcript.show(event) for event in events)
    return re.sub(r"\x1b\[\d+m", "", re.sub(r"\d\d:\d\d:\d\d  ", "", whole))


def test_what_is_missing_is_a_line() -> None:
    events = [EventsMissing(num_missing=number, at=0) for number in (7, None)]
    assert shown(*events) == (
        "7 events are missing: the stream keeps the newest\nsome events are missing: the stream keeps the newest\n"
    )


def test_steps_are_lines_and_text_stands_between_them() -> None:
    events = (
        stage(Stage.DECODE),
        FramesDecoded(media_index=1, done=3, total=9, attempt=1, at=0),
        stage(Stage.GENERATE),
        text("analysis", "Hard."),
        text("reasoning", "It is "),
        text("reasoning", "red.", offset=6),
        text("answer", "red", num_tokens=9),
        ENDED,
    )
    assert shown(*events) == (
        "decode (attempt 1)\nmedium 1: 3 of 9 frames\ngenerate (attempt 1)\n\nHard.\n\nIt is red.\n\nred\n\nSUCCEEDED\n"
    )


def test_reasoning_and_analysis_are_dim_and_the_answer_is_not() -> None:
    transcript = Transcript()
    assert "\x1b[2m" in transcript.show(text("analysis", "Hard."))
    assert "\x1b[2m" in transcript.show(text("reasoning", "so"))
    assert "\x1b[2m" not in transcript.show(text("answer", "red"))


def test_text_that_was_missed_is_marked_and_text_told_twice_is_shown_once() -> None:
    assert shown(text("answer", "a bc"), text("answer", "bcd", offset=2), text("answer", "z", offset=9)) == (
        "\na bcd[...]z"
    )


def test_another_attempt_writes_its_text_anew() -> None:
    queued = StageStarted(stage=Stage.QUEUED, attempt=1, at=0, reason=QueuedAgain.GIVEN_BACK)
    again = (queued, stage(Stage.OPEN, attempt=2), text("answer", "blue", attempt=2, num_tokens=2), ENDED)
    assert (
        shown(text("answer", "re"), *again)
        == "\nre\n\nqueued (attempt 1, given back)\nopen (attempt 2)\n\nblue\n\nSUCCEEDED\n"
    )


def test_a_job_that_wrote_nothing_ends_without_a_count() -> None:
    assert shown(ENDED) == "SUCCEEDED\n"
