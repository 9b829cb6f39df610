"""The producer's front door: send a job, find it again."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from os import PathLike
from typing import IO, TYPE_CHECKING, Any, Self, TypedDict, Unpack

from pydantic import SecretStr, ValidationError

from keye.config.contract import escaped, faults_of, list_faults, name_kind
from keye.config.faults import InvalidJob, Refusal
from keye.config.job import AnalysisJob, ChatMessage, GenerationOptions, MediaPart, Priority, Thinking
from keye.config.settings import ProducerSettings
from keye.config.wire import SealedJob, seal
from keye.producer.dead_letters import DeadLetters, Quarantine
from keye.producer.job import Job
from keye.producer.transport import Transport, reaching_redis
from keye.producer.upload import Media
from keye.producer.verify import Irregularity, Ledger, verify

if TYPE_CHECKING:
    from PIL.Image import Image

    Medium = str | PathLike[str] | bytes | bytearray | memoryview | IO[bytes] | Image | MediaPart | Mapping[str, Any]

# Enough that the way to Redis and back no longer counts, and few enough that nobody waits for their replies.
JOBS_PER_ROUND_TRIP = 250


class JobFields(TypedDict, total=False):
    """The fields of an `AnalysisJob`, as loosely as `Client.submit` takes them."""

    media: "Medium | Iterable[Medium] | None"
    prompt: str | None
    messages: ChatMessage | Mapping[str, Any] | Iterable[ChatMessage | Mapping[str, Any]] | None
    thinking: Thinking | str
    generation: GenerationOptions | Mapping[str, Any]
    priority: Priority | str
    deadline_seconds: float | None
    max_attempts: int
    idempotency_key: str | None
    metadata: Mapping[str, Any]


class Client:
    """Sends jobs to the workers of one Redis. One client serves all threads of a process, and its forked children.

    >>> with Client("redis://127.0.0.1:6379/0") as client:
    ...     job = client.submit(prompt="What is in the picture?", media=["s3://bucket/cat.jpg"])
    ...     print(job.result(timeout=60).answer)
    """

    def __init__(self, target: str | ProducerSettings | None = None) -> None:
        """`target` is a Redis URL or settings; without it `KEYE_REDIS_URL` is read, as a worker reads it.

        Raises `InvalidSettings`.
        """
        if isinstance(target, str):
            target = ProducerSettings.read(redis_url=SecretStr(target))
        self._settings = target or ProducerSettings.read()
        self._transport = Transport(self._settings)

    def submit(self, job: AnalysisJob | None = None, /, **fields: Unpack[JobFields]) -> Job:
        """Queue a job: an `AnalysisJob`, or the fields of one (`prompt=...`, `media=[...]`, `generation=...`).

        Among `fields`, a medium may be a string or a path whose suffix tells an image from a video, or whose first
        bytes do, where the file is here; or bytes of a file, a file opened with 'rb', or a PIL image: up to 1 MiB
        travels inside the job, more is uploaded to where KEYE_UPLOAD_PREFIX says. One alone needs no list.
        Under an `idempotency_key` that was used before, the first job is returned and nothing is queued twice.

        Raises `InvalidJob` with every fault (or where the new tokens alone are all that the workers hold for a job),
        `UploadFailed` when a medium could not be uploaded, `IdempotencyConflict` when the key belongs to another job,
        and `QueueUnavailable` when Redis is away or refuses.
        Where its answer was lost the job may run all the same: submit it again under the same key, and it runs once.
        """
        if job is not None and fields:
            raise TypeError(f"submit takes an AnalysisJob or its fields, not both; it was also given {sorted(fields)}")
        sealed = self._seal(fields if job is None else job)
        return Job(self._transport.submit(sealed), self._transport)

    def submit_many(self, jobs: Iterable[AnalysisJob | Mapping[str, Any] | Refusal]) -> list[Job | Refusal]:
        """Queue many jobs, a few hundred in a round trip: each an `AnalysisJob`, or the fields of one as for `submit`.

        Returns in their order each job's handle, or the error that `submit` would have raised, which costs its
        neighbours nothing: a `Refusal` has a job's verbs, so that its `result()` raises it. One that is among `jobs`
        stays in its place. What a medium or `jobs` itself raises becomes an `InvalidJob` with that for its cause, and
        ends the list where `jobs` raised it.
        """
        answers: list[Job | Refusal] = []
        waiting = self._seal_all(jobs)
        while batch := list(islice(waiting, JOBS_PER_ROUND_TRIP)):
            sent = self._transport.submit_many(batch)
            answers += (Job(each, self._transport) if isinstance(each, str) else each for each in sent)
        return answers

    def _seal_all(self, jobs: Iterable[AnalysisJob | Mapping[str, Any] | Refusal]) -> Iterator[SealedJob | Refusal]:
        """Each of them, or why it is none; ends where `jobs` itself raises, with that for the last."""
        try:
            for job in jobs:
                try:
                    yield job if isinstance(job, Refusal) else self._seal(job)
                except Exception as error:
                    yield error if isinstance(error, Refusal) else _refuse(error)
        except Exception as error:
            yield _refuse(error)

    def _seal(self, job: AnalysisJob | Mapping[str, Any]) -> SealedJob:
        return seal(job if isinstance(job, AnalysisJob) else build_job(job, self._settings))

    def find(self, job_id: str) -> Job:
        """The handle of a job sent earlier or elsewhere. Raises `JobNotFound`."""
        self._transport.read_record(job_id, "state")
        return Job(job_id, self._transport)

    @property
    def dead_letters(self) -> DeadLetters:
        """The jobs that failed for good."""
        return DeadLetters(self.submit, self._transport)

    @property
    def quarantine(self) -> Quarantine:
        """The messages that no worker could read."""
        return Quarantine(self._transport)

    def verify(self) -> tuple[Ledger, list[Irregularity]]:
        """All jobs, and those in no legal state; reads everything, and for an operator."""
        with reaching_redis("be read"):
            return verify(self._transport.redis, self._settings.lease_seconds)

    def close(self) -> None:
        self._transport.redis.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def build_job(fields: Mapping[str, Any], settings: ProducerSettings | None = None) -> AnalysisJob:
    """An `AnalysisJob` from its fields as `Client.submit` takes them; uploads what does not fit into it.

    Raises `InvalidJob` with every fault at once, before anything is uploaded, and `UploadFailed`.
    """
    if not isinstance(fields, Mapping):
        raise InvalidJob(f"1 fault: job: Input should be an AnalysisJob or its fields, not {name_kind(fields)}")
    fields = dict(fields)
    media = Media(fields.get("media"), settings)
    faults = media.faults
    if "media" in fields:
        fields["media"] = media.parts
    if isinstance(fields.get("messages"), Mapping | ChatMessage):
        fields["messages"] = [fields["messages"]]
    try:
        job = AnalysisJob.model_validate(fields)
    except ValidationError as error:
        faults = faults + faults_of(error)
    if faults:
        raise InvalidJob(list_faults(faults))
    media.upload()
    return job


def _refuse(error: Exception) -> InvalidJob:
    """For what a caller's own objects raise among many jobs: the handles of those already queued must reach him."""
    refusal = InvalidJob(f"1 fault: job: reading it raised {type(error).__name__}: {escaped(str(error))}")
    refusal.__cause__ = error
    return refusal
