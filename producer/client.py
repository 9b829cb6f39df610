"""The producer's front door: send a job, find it again."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from os import PathLike, fspath
from types import TracebackType
from typing import Any, Self

from pydantic import SecretStr, ValidationError

from keye.config.contract import describe_faults
from keye.config.faults import InvalidJob, JobNotFound, Refusal
from keye.config.formats import media_type_of
from keye.config.job import AnalysisJob
from keye.config.settings import ProducerSettings
from keye.producer.dead_letters import DeadLetters, Quarantine
from keye.producer.job import Job
from keye.producer.transport import Envelope, Transport, enclose, reaching_redis
from keye.producer.upload import references_of
from keye.producer.verify import Irregularity, Ledger, verify

# Enough that the way to Redis and back no longer counts, and few enough that nobody waits for their replies.
JOBS_PER_ROUND_TRIP = 250


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

    def submit(self, job: AnalysisJob | None = None, /, **fields: Any) -> Job:
        """Queue a job: an `AnalysisJob`, or the fields of one (`prompt=...`, `media=[...]`, `generation=...`).

        Among `fields`, a medium may be a string or a path whose suffix tells an image from a video, or whose first
        bytes do, where the file is here; or bytes of a file, or a PIL image: up to 1 MiB travels inside the job, more
        is uploaded to where KEYE_UPLOAD_PREFIX says.
        Under an `idempotency_key` that was used before, the first job is returned and nothing is queued twice.

        Raises `InvalidJob` with every fault (or where the new tokens alone are all that the workers hold for a job),
        `UploadFailed` when a medium could not be uploaded, `IdempotencyConflict` when the key belongs to another job,
        and `QueueUnavailable` when Redis is away or refuses.
        Where its answer was lost the job may run all the same: submit it again under the same key, and it runs once.
        """
        if job is not None and fields:
            raise TypeError(f"submit takes an AnalysisJob or its fields, not both; it was also given {sorted(fields)}")
        envelope = self._enclose(fields if job is None else job)
        return Job(self._transport.submit(envelope), self._transport)

    def submit_many(self, jobs: Iterable[AnalysisJob | Mapping[str, Any]]) -> list[Job | Refusal]:
        """Queue many jobs, a few hundred in a round trip: each an `AnalysisJob`, or the fields of one as for `submit`.

        Returns in their order each job's handle, or the error that `submit` would have raised, which costs its
        neighbours nothing: a `Refusal` has a job's verbs, so that its `result()` raises it.
        """
        waiting = iter(jobs)
        answers: list[Job | Refusal] = []
        while batch := list(islice(waiting, JOBS_PER_ROUND_TRIP)):
            answers += self._submit_batch(batch)
        return answers

    def _submit_batch(self, jobs: Sequence[AnalysisJob | Mapping[str, Any]]) -> Iterator[Job | Refusal]:
        sealed: list[Envelope | Refusal] = []
        for job in jobs:
            try:
                sealed.append(self._enclose(job))
            except Refusal as refusal:
                sealed.append(refusal)
        answers = iter(self._transport.submit_many([e for e in sealed if isinstance(e, Envelope)]))
        for envelope in sealed:
            answer = next(answers) if isinstance(envelope, Envelope) else envelope
            yield Job(answer, self._transport) if isinstance(answer, str) else answer

    def _enclose(self, job: AnalysisJob | Mapping[str, Any]) -> Envelope:
        return enclose(job if isinstance(job, AnalysisJob) else build_job(self._with_references(dict(job))))

    def _with_references(self, fields: dict[str, Any]) -> dict[str, Any]:
        media = fields.get("media")
        if not isinstance(media, list | tuple):
            return fields
        return fields | {"media": references_of(media, self._settings)}

    def find(self, job_id: str) -> Job:
        """The handle of a job sent earlier or elsewhere. Raises `JobNotFound`."""
        (state,) = self._transport.read_record(job_id, "state")
        if state is None:
            raise JobNotFound.of(job_id)
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
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def build_job(fields: dict[str, Any]) -> AnalysisJob:
    """An `AnalysisJob` from its fields. Raises `InvalidJob` with every fault at once."""
    media = fields.get("media")
    if isinstance(media, list | tuple):
        fields = fields | {
            "media": [typed_part(i, fspath(m)) if isinstance(m, str | PathLike) else m for i, m in enumerate(media)]
        }
    try:
        return AnalysisJob.model_validate(fields)
    except ValidationError as error:
        raise InvalidJob(describe_faults(error)) from None


def typed_part(index: int, uri: str) -> dict[str, str]:
    media_type = media_type_of(uri)
    if media_type is None:
        raise InvalidJob(
            f"1 fault: media.{index}: neither its suffix nor bytes that could be read here tell image from video. "
            "Give an ImagePart or a VideoPart."
        )
    return {"type": media_type, "uri": uri}
