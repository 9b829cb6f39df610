"""The wire may grow: what an older release makes of a newer one's words, and a newer one of an older's."""

import json
from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Literal

import pytest
from pydantic import Field, TypeAdapter, ValidationError

from keye.config import wire
from keye.config.codes import ErrorCode, JobState, QueuedAgain, Stage
from keye.config.contract import Report, added_in, version_needed
from keye.config.event import (
    EVENT,
    AnswerEnded,
    EndedJob,
    Event,
    EventsMissing,
    FramesDecoded,
    Heartbeat,
    JobEnded,
    StageStarted,
    TextGenerated,
    read_event,
)
from keye.config.faults import InvalidJob, JobFailed, UnknownSchemaVersion
from keye.config.job import AnalysisJob, Content, GenerationOptions, MediaPart, Priority, VideoPart
from keye.config.outcome import (
    OUTCOME,
    Answer,
    FailedAttempt,
    Generation,
    JobFailure,
    JobResult,
    MediaSeen,
    ModelIdentity,
    PartialText,
    StageTimings,
    TokenLogprob,
    TokenUsage,
    Unanswered,
    WorkerIdentity,
)
from keye.config.presence import EngineUse, Presence, StarvedSeconds, WorkerState
from keye.config.quarantine import QuarantinedMessage
from keye.config.wire import JobOutline, Outline, SealedJob, open_sealed, record_of, seal
from keye.producer.progress import Progress
from keye.producer.records import JobSummary
from keye.producer.status import FleetStatus, QueueStatus
from keye.worker.broker.canvas import Asked, Canvas
from keye.worker.leases.claims import Claimed
from keye.worker.results.outbox import Verdict

TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
MODEL = ModelIdentity(name="Keye", model_type="Keye", precision="bfloat16")
WORKER = WorkerIdentity(host="here", pid=1, device="cpu")
USAGE = TokenUsage(prompt_tokens=9, visual_tokens=4, completion_tokens=2)
GENERATION = Generation(
    max_new_tokens=9, temperature=0.5, top_p=1, top_k=0, repetition_penalty=1, stop=(), seed=1, thinking="auto"
)
ANSWER = Answer(
    question=0,
    sample=0,
    answer="a cat",
    analysis=None,
    reasoning=None,
    raw_text="a cat",
    finish_reason="stop",
    usage=USAGE,
    first_token_seconds=None,
    generation=GENERATION,
    logprobs=(TokenLogprob(token_id=1, token="a cat", logprob=-0.5),),
)
RESULT = JobResult(
    job_id="1",
    answer="a cat",
    reasoning=None,
    raw_text="a cat",
    finish_reason="stop",
    usage=USAGE,
    timings=StageTimings(total=1.5),
    media=(MediaSeen(type="image", original_size=(56, 56), resized_size=(56, 56), visual_tokens=4),),
    model=MODEL,
    worker=WORKER,
    attempts=1,
    generation=GENERATION,
    answers=(ANSWER, Unanswered(question=0, sample=1, code=ErrorCode.OUT_OF_MEMORY, message="why")),
)
FAILURE = JobFailure(
    job_id="1",
    code=ErrorCode.CANCELLED,
    message="why",
    stage=Stage.GENERATE,
    retryable=False,
    attempts=1,
    partial=PartialText(answer="a", reasoning=None, raw_text="a", completion_tokens=1),
)
ATTEMPT = FailedAttempt(
    attempt=1, worker="here:1", began_at=1, ended_at=2, stage=Stage.FETCH, code=ErrorCode.INTERNAL, message="why"
)
LEASE = Claimed("1", "token", 1, 3, 0.0, None, None, None)
MESSAGE = QuarantinedMessage(message_id="1-0", reason="?", worker="gpu-1:7", job_id=None, size=3, raw=b"[1]")
PROGRESS = Progress(
    state=JobState.RUNNING,
    stage=Stage.DECODE,
    attempt=1,
    frames_done=1,
    frames_total=2,
    num_tokens=0,
    place=None,
    seconds_left=2.5,
    has_worker=True,
)
USE = EngineUse(running=1, max_running=2, seconds=9.5, starved_seconds=StarvedSeconds(decode=2.5))
STATUS = FleetStatus(
    queues=(QueueStatus(priority="low", depth=1, oldest_seconds=2.5),),
    running=1,
    dead_letters=0,
    quarantined_messages=0,
    workers=(),
    work_seconds=9.5,
    drain_seconds=None,
)
REPORTS: list[tuple[Any, Any]] = [
    (OUTCOME, RESULT),
    (OUTCOME, FAILURE),
    (EVENT, StageStarted(stage=Stage.OPEN, attempt=1, at=1)),
    (EVENT, FramesDecoded(media_index=0, done=1, total=2, attempt=1, at=1)),
    (EVENT, TextGenerated(channel="answer", text="a", offset=0, num_tokens=1, attempt=1, at=1)),
    (EVENT, JobEnded(state=JobState.FAILED, at=1)),
    (TypeAdapter(FailedAttempt), ATTEMPT),
    (TypeAdapter(Presence), Presence(worker=WORKER, state=WorkerState.READY, model=MODEL, max_tokens=9, engine=USE)),
    (TypeAdapter(Verdict), Verdict(lease=LEASE, outcome=RESULT)),
    (TypeAdapter(Asked), Asked(refused="?", canvas=Canvas(group="g"))),
    (TypeAdapter(QuarantinedMessage), MESSAGE),
    (TypeAdapter(EndedJob), EndedJob(id="1-0", job_id="1", state=JobState.FAILED, at=1)),
    (TypeAdapter(Progress), PROGRESS),
    (TypeAdapter(FleetStatus), STATUS),
    (EVENT, StageStarted(stage=Stage.QUEUED, attempt=1, at=1, reason=QueuedAgain.LOST)),
    (EVENT, AnswerEnded(question=0, sample=1, code=ErrorCode.OUT_OF_MEMORY, attempt=1, at=1)),
]


def objects_in(value: Any) -> Iterator[dict[str, Any]]:
    """Every JSON object of a document, the free-form `metadata` left out."""
    if isinstance(value, dict):
        yield value
        for name, inner in value.items():
            if name != "metadata":
                yield from objects_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from objects_in(inner)


@pytest.mark.holds("docs/operations.md#how-do-i-upgrade-a-fleet", "Readers pass over what a newer worker says besides.")
@pytest.mark.parametrize(("reader", "report"), REPORTS, ids=lambda value: type(value).__name__)
def test_a_planted_new_field_of_a_report_is_passed_over_wherever_it_stands(reader: Any, report: Any) -> None:
    document = report.model_dump(mode="json")
    for each in list(objects_in(document)):
        each["planted"] = {"by": ["a", "newer", "release"]}
    assert reader.validate_json(json.dumps(document)) == report


@pytest.mark.parametrize(
    ("reader", "report", "field"),
    [
        (OUTCOME, RESULT, "finish_reason"),
        (OUTCOME, FAILURE, "code"),
        (OUTCOME, FAILURE, "stage"),
        (TypeAdapter(MediaSeen), RESULT.media[0], "type"),
        (EVENT, REPORTS[2][1], "stage"),
        (EVENT, REPORTS[2][1], "reason"),
        (EVENT, REPORTS[4][1], "channel"),
        (EVENT, REPORTS[5][1], "state"),
        (TypeAdapter(FailedAttempt), ATTEMPT, "code"),
        (TypeAdapter(FailedAttempt), ATTEMPT, "stage"),
        (TypeAdapter(Presence), REPORTS[7][1], "state"),
    ],
)
def test_a_planted_new_word_of_a_report_is_kept_as_it_was_said(reader: Any, report: Any, field: str) -> None:
    document = report.model_dump(mode="json") | {field: "PLANTED"}
    read = reader.validate_json(json.dumps(document))
    assert getattr(read, field) == "PLANTED"
    assert f"{getattr(read, field)}" == "PLANTED"
    assert reader.dump_python(read, mode="json") == document


def test_what_a_worker_before_0_3_told_has_no_analysis_apart() -> None:
    for report in (RESULT, FAILURE):
        document = report.model_dump(mode="json")
        for each in objects_in(document):
            each.pop("analysis", None)
        assert OUTCOME.validate_json(json.dumps(document)) == report


def test_a_failure_with_a_code_of_a_newer_release_is_raised_like_any_other() -> None:
    failure = OUTCOME.validate_json(json.dumps(FAILURE.model_dump(mode="json") | {"code": "PLANTED"}))
    assert isinstance(failure, JobFailure)
    raised = JobFailed.of(failure)
    assert raised.code == "PLANTED"
    assert str(raised) == "PLANTED: why"
    assert raised.code.facts.meaning.startswith("A code of a newer release")
    assert raised.failure == failure
    assert failure.state is JobState.FAILED


def test_a_planted_new_type_of_event_is_passed_over_and_a_broken_event_is_not() -> None:
    assert read_event('{"type": "planted", "at": 1, "attempt": 1}') is None
    with pytest.raises(ValidationError):
        read_event('{"type": "stage", "at": 1}')


def test_every_report_is_tried_here() -> None:
    def models_in(value: Any) -> Iterator[type[Report]]:
        if isinstance(value, Report):
            yield type(value)
            for _, inner in value:
                yield from models_in(inner)
        elif isinstance(value, tuple):
            for inner in value:
                yield from models_in(inner)

    tried = {model for _, report in REPORTS for model in models_in(report)}
    # These are made by who reads.
    others = {Outline.__base__, JobOutline, Outline, Event, EventsMissing, Heartbeat, JobSummary}
    kinds = {*Report.__subclasses__(), *Event.__subclasses__()}
    assert {model for model in kinds if model.__module__ != __name__} - others == tried


class Style(StrEnum):
    PLAIN = "plain"
    ORNATE = "ornate"

    @property
    def added_in(self) -> int:
        return 3 if self is Style.ORNATE else 1


class WiderVideo(VideoPart):
    """As in a later release: three fields came in two versions, and in a third a new value of one of them."""

    mirrored: bool = added_in(2, default=False)
    captions: tuple[str, ...] = added_in(4, default=())
    style: Style = added_in(2, default=Style.PLAIN)


class AudioPart(MediaPart):
    """A kind of part that came with a version of its own."""

    added_in: ClassVar[int] = 5
    type: Literal["audio"] = "audio"


class WiderJob(AnalysisJob):
    media: tuple[Annotated[WiderVideo | AudioPart, Field(discriminator="type")], ...] = ()


class WiderSealedJob(SealedJob):
    job: WiderJob


def wider(**fields: Any) -> WiderJob:
    return WiderJob(prompt="?", media=(WiderVideo(uri="/a.mp4", **fields),))


@pytest.mark.parametrize(
    ("fields", "version"),
    [
        ({}, 1),
        ({"mirrored": False, "captions": ()}, 1),
        ({"mirrored": True}, 2),
        ({"style": Style.ORNATE}, 3),
        ({"mirrored": True, "captions": ("a",)}, 4),
    ],
)
def test_a_job_needs_the_lowest_version_that_knows_what_it_uses(fields: dict[str, Any], version: int) -> None:
    assert version_needed(wider(**fields)) == version


def test_a_planted_new_kind_of_part_needs_the_version_it_came_with() -> None:
    job = WiderJob(prompt="?", media=(AudioPart(uri="/a.mp3"),))
    assert version_needed(job) == 5
    assert job.model_dump(mode="json")["media"][0]["type"] == "audio"


def test_a_job_that_does_not_use_a_planted_new_field_is_read_by_releases_without_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(wire, "SealedJob", WiderSealedJob)
    payload = json.loads(seal(wider()).model_dump_json())
    monkeypatch.undo()
    assert payload["schema_version"] == 1
    assert open_sealed(payload).job == AnalysisJob(prompt="?", media=(VideoPart(uri="/a.mp4"),))


def test_a_job_that_uses_a_planted_new_field_is_named_as_newer_and_comes_back_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(wire, "SealedJob", WiderSealedJob)
    sealed = seal(wider(captions=("a",)))
    payload = json.loads(sealed.model_dump_json())
    assert WiderSealedJob.model_validate(payload) == sealed
    monkeypatch.undo()
    with pytest.raises(UnknownSchemaVersion, match="version 4, this release reads up to 2") as unknown:
        open_sealed(payload)
    assert unknown.value.is_newer
    monkeypatch.setattr(wire, "SCHEMA_VERSION", 4)
    with pytest.raises(InvalidJob, match="captions"):
        open_sealed(payload)


@pytest.mark.holds(
    "docs/producers.md#from-any-language",
    "2 with a `traceparent`, a `result_ttl_seconds`, `max_thinking_tokens`,",
    'a medium\'s `digest` or `content="auto"`, 1 for all others',
)
@pytest.mark.holds(
    "docs/producers.md#from-python", "Workers before 0.3 leave a job with one of these two to newer ones."
)
@pytest.mark.holds(
    "docs/producers.md#whether-it-thinks-first", "Workers before 0.3 leave a job with this bound to newer ones."
)
@pytest.mark.parametrize(("field", "value"), [("traceparent", TRACEPARENT), ("result_ttl_seconds", 60)])
def test_a_job_of_a_later_field_is_sealed_for_workers_that_know_it_and_all_others_for_any(
    field: str, value: Any
) -> None:
    later = json.loads(seal(AnalysisJob.model_validate({"prompt": "?", field: value})).model_dump_json())
    assert (later["schema_version"], later["job"][field]) == (2, value)
    assert getattr(open_sealed(later).job, field) == value
    assert getattr(Outline.of(later).job, field) == value
    for newer in (VideoPart(uri="/a.mp4", digest=True), VideoPart(uri="/a.mp4", content=Content.AUTO)):
        assert seal(AnalysisJob(prompt="?", media=(newer,))).schema_version == 2
    assert seal(AnalysisJob(prompt="?", media=(VideoPart(uri="/a.mp4", content=Content.HD),))).schema_version == 1
    assert seal(AnalysisJob(prompt="?", generation=GenerationOptions(max_thinking_tokens=0))).schema_version == 2
    assert "max_thinking_tokens" not in seal(AnalysisJob(prompt="?")).model_dump_json()
    alone = json.loads(seal(AnalysisJob(prompt="?")).model_dump_json())
    assert alone["schema_version"] == 1
    assert field not in alone["job"]


GROWN: list[dict[str, Any]] = [
    {"planted": 1},
    {"thinking": "briefly"},
    {"media": [{"type": "audio", "uri": "/a.mp3"}]},
    {"media": [{"type": "image", "uri": "gs://bucket/a.png"}]},
    {"prompt": {"text": "?", "language": "en"}},
    {"generation": {"max_new_tokens": "many"}},
]


@pytest.mark.parametrize("growth", GROWN, ids=lambda growth: next(iter(growth)))
def test_an_outline_tells_of_any_newer_job_what_it_takes_to_end_it(growth: dict[str, Any]) -> None:
    job = AnalysisJob(
        prompt="?", priority="low", idempotency_key="k", deadline_seconds=9, max_attempts=2, metadata={"order": 7}
    )
    sealed = seal(job)
    payload = json.loads(sealed.model_dump_json()) | {"schema_version": 7}
    payload["job"] |= growth
    outline = Outline.of(payload)
    assert (outline.job_id, outline.submitted_at) == (sealed.job_id, sealed.submitted_at)
    assert outline.job == JobOutline(
        priority=Priority.LOW, idempotency_key="k", deadline_seconds=9, max_attempts=2, metadata={"order": 7}
    )
    assert record_of(outline.job, outline.submitted_at, "raw") == sealed.record | {"sealed": "raw", "kind": ""}


@pytest.mark.parametrize(
    "payload",
    [
        None,
        [],
        7,
        "text",
        {},
        {"job": 7},
        {"job_id": ["1"], "submitted_at": "now", "job": {"priority": "soon", "metadata": []}},
        {"job_id": "half \ud800", "job": {"idempotency_key": "\udfff", "max_attempts": -1, "deadline_seconds": "x"}},
    ],
)
def test_an_outline_of_whatever_is_sent_has_the_defaults_for_what_cannot_be_read(payload: Any) -> None:
    assert Outline.of(payload) == Outline()


def test_versions_before_the_first_are_nobodys() -> None:
    with pytest.raises(UnknownSchemaVersion) as unknown:
        open_sealed({"schema_version": 0})
    assert not unknown.value.is_newer


@pytest.mark.holds("docs/producers.md#from-any-language", "Unknown fields are refused", "Outcomes and events grow")
def test_published_schemas_of_reports_are_open_and_those_of_jobs_are_not() -> None:
    for name, is_open in (("outcome", True), ("event", True), ("job", False)):
        objects = [
            each for each in objects_in(wire.schemas()[name]) if each.get("type") == "object" and "title" in each
        ]
        closed = [each["title"] for each in objects if each.get("additionalProperties") is False]
        assert objects
        assert (closed == []) == is_open
