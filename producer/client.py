"""The producer's front door: send a job, find it again."""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, Self, Unpack

from pydantic import SecretStr, ValidationError

from keye.config.codes import ErrorCode, JobState
from keye.config.contract import escaped, faults_of, list_faults, name_kind
from keye.config.event import EndedJob
from keye.config.faults import InvalidJob, JobUnreadable, KeyeError, Refusal
from keye.config.job import AnalysisJob
from keye.config.settings import ProducerSettings
from keye.config.wire import SealedJob, open_sealed, read_sealed, seal
from keye.producer.batch.batch import Batch
from keye.producer.dead_letters import DeadLetters, Quarantine
from keye.producer.fields import BatchOptions, JobFields, JobOptions
from keye.producer.following import End, EndsFollowing, FeedFollowing, Follow, order_of, taken
from keye.producer.job import Cancellation, Job, cancel_queued
from keye.producer.many import BATCHES_AHEAD, Awaited, InOrder, batches, refused_as_full
from keye.producer.medium import is_many
from keye.producer.overview import Overview, read_overview
from keye.producer.progress import RECORD_FIELDS, JobStatus
from keye.producer.records import Listing, list_jobs
from keye.producer.replay import seeded
from keye.producer.status import FleetStatus, read_status
from keye.producer.transport import Transport, reaching_redis
from keye.producer.upload import Media
from keye.producer.verify import Irregularity, Ledger, verify

if TYPE_CHECKING:
    from keye.producer.fields import Medium


class Client:
    """Sends jobs to the workers of one Redis. One client serves all threads of a process, and its forked children.

    >>> with Client("redis://127.0.0.1:6379/0") as client:
    ...     job = client.submit(prompt="What is in the picture?", media=["s3://bucket/cat.jpg"])
    ...     print(job.result(timeout=60).answer)
    """

    # That end with it.
    _batches: tuple[Batch, ...] = ()

    def __init__(self, target: str | ProducerSettings | None = None, *, key_prefix: str | None = None) -> None:
        """`target` is a Redis URL or settings; without it `KEYE_REDIS_URL` is read, as a worker reads it.

        `key_prefix` ("" for none) is the workers' `KEYE_KEY_PREFIX`, which is read where it is not given here. Settings
        have their own. Raises `InvalidSettings`.
        """
        if isinstance(target, ProducerSettings):
            if key_prefix is not None:
                raise TypeError("key_prefix goes with a URL; of settings it is a field")
            self._settings = target
        else:
            given: dict[str, Any] = {} if key_prefix is None else {"key_prefix": key_prefix}
            if target is not None:
                # A password from the environment is that of KEYE_REDIS_URL, and not for whatever server is named here.
                given |= {"redis_url": SecretStr(target), "redis_password": None}
            self._settings = ProducerSettings.read(**given)
        self._transport = Transport(self._settings)

    def submit(
        self, job: AnalysisJob | None = None, /, *, retry_failed: bool = False, **fields: Unpack[JobFields]
    ) -> Job:
        """Queue a job: an `AnalysisJob`, or the fields of one (`prompt=...`, `media=[...]`, `generation=...`).

        Among `fields`, a medium may be a URI or an absolute path, which workers follow; or a `Path` or a relative path
        of a file that is here, bytes, a file opened with 'rb', a PIL image or an array of (height, width, RGB): up to
        1 MiB travels inside the job, more is uploaded to where KEYE_UPLOAD_PREFIX says. One alone needs no list.
        Under an `idempotency_key` that was used before, the first job is returned and nothing is queued twice, even if
        it failed: with `retry_failed` the job is queued anew where that one ended without an answer.

        Raises `InvalidJob` with every fault (or where its words alone are more tokens than the workers hold for a job),
        `UploadFailed` when a medium could not be uploaded, `IdempotencyConflict` when the key belongs to another job,
        `QueueFull` where KEYE_MAX_QUEUE_DEPTH is reached, and `QueueUnavailable` when Redis is away or refuses.
        Where its answer was lost the job may run all the same: submit it again under the same key, and it runs once.
        """
        if job is not None and fields:
            raise TypeError(f"submit takes an AnalysisJob or its fields, not both; it was also given {sorted(fields)}")
        sealed = self._seal(fields if job is None else job)
        return self.job(self._transport.submit(sealed, retry_failed))

    def submit_many(
        self, jobs: Iterable[AnalysisJob | Mapping[str, Any] | Refusal], retry_failed: bool = False
    ) -> list[Job | Refusal]:
        """Queue many jobs, a few hundred in a round trip: each an `AnalysisJob`, or the fields of one as for `submit`.

        Returns in their order each job's handle, or the error that `submit` would have raised, which costs its
        neighbours nothing: a `Refusal` has a job's verbs, so that its `result()` raises it. One that is among `jobs`
        stays in its place. What a medium or `jobs` itself raises becomes an `InvalidJob` with that for its cause, and
        ends the list where `jobs` raised it.
        """
        return [job for batch in batches(self.seal_all(jobs)) for job in self.send(batch, retry_failed)]

    def send(self, jobs: Sequence[SealedJob | Refusal], retry_failed: bool = False) -> list[Job | Refusal]:
        """Queue what `seal_all` gave, in one round trip; sent again, nothing is queued twice."""
        answers = self._transport.submit_many(jobs, retry_failed)
        return [self.job(each) if isinstance(each, str) else each for each in answers]

    def seal_all(self, jobs: Iterable[AnalysisJob | Mapping[str, Any] | Refusal]) -> Iterator[SealedJob | Refusal]:
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
        return seal(job) if isinstance(job, AnalysisJob) else seal(build_job(job, self._media()), is_new=True)

    def _media(self) -> Media:
        """For those of a job."""
        return Media(self._settings)

    def results(
        self, jobs: Iterable[Job | Refusal | str], timeout: float | None = None
    ) -> Iterator[tuple[Job | Refusal, End]]:
        """Each of the jobs (or of their ids) with how it ended, as they end; whatever is in place of an outcome too.

        That is a `Refusal` that stood among the jobs, `JobNotFound`, `JobNotEnded` after `timeout` seconds or behind
        the deadline of a job that no worker is there to end, and `QueueUnavailable` once Redis was away for a minute.
        Nothing is raised, and each job comes once. Those that have ended are read hundreds at a time.
        """
        awaited = Awaited(self.job(job) if isinstance(job, str) else job for job in jobs)
        yield from awaited.refused
        for job_id, end in taken(self.follow_ends(awaited.by_id, timeout)):
            yield from ((job, end) for job in awaited.by_id[job_id])

    def map(
        self, prompt: str, media: "Iterable[Medium | Iterable[Medium]]", **options: Unpack[JobOptions]
    ) -> Iterator[End]:
        """Ask the same about each of `media`, a job each; how they ended, in their order.

        Jobs are submitted some hundreds ahead of what is read, so that `media` may be without end. A full queue is
        waited for; whatever else is in place of an outcome stands in its place, as for `results`. What `media` itself
        raises is the cause of an `InvalidJob`, the last.
        """
        yield from self._ask_ahead(self.seal_about(media, prompt, options))

    def seal_about(
        self, media: "Iterable[Medium | Iterable[Medium]]", prompt: str, options: JobOptions
    ) -> Iterator[list[SealedJob | Refusal]]:
        """A job for each of them, in batches: small ones first, for media that come slowly."""
        if not is_many(media):
            raise TypeError("map asks about many media, each a job: give a list of them, or another iterable.")
        return batches(self.seal_all({**options, "prompt": prompt, "media": medium} for medium in media), first=1)

    def _ask_ahead(self, jobs: Iterable[list[SealedJob | Refusal]]) -> Iterator[End]:
        """How they ended, in their order; some batches are sent ahead of what is read."""
        ahead: deque[list[Job | Refusal]] = deque()
        for batch in jobs:
            ahead.append(self._send_patiently(batch))
            if len(ahead) == BATCHES_AHEAD:
                yield from self._in_order(ahead.popleft())
        for answers in ahead:
            yield from self._in_order(answers)

    def _send_patiently(self, batch: list[SealedJob | Refusal]) -> list[Job | Refusal]:
        answers = self.send(batch)
        while full := refused_as_full(answers):
            time.sleep(max(full.values()))
            for index, answer in zip(full, self.send([batch[i] for i in full]), strict=True):
                answers[index] = answer
        return answers

    def _in_order(self, answers: list[Job | Refusal]) -> Iterator[End]:
        in_order = InOrder(answers)
        for job, end in self.results(answers):
            yield from in_order.add(job, end)

    def submit_batch(
        self,
        source: str | PathLike[str],
        output: str | PathLike[str],
        prompt: str | None = None,
        **options: Unpack[BatchOptions],
    ) -> Batch:
        """Ask what each line of a file asks, or `prompt` about all that a folder or `s3://` prefix holds.

        `source` is JSON lines (fields of a job and a `custom_id`, or those of OpenAI's batches), a CSV or TSV table
        whose first row names its columns, a folder, or a prefix of a bucket. Answers go to `output`, a line of JSON
        each, and what failed to `errors` (`out.errors.jsonl` beside `out.jsonl`); `report` is a page about both, for
        people. The batch runs until every line has ended; asked for again, after whatever ended it, it goes on where it
        was, with `retry_failed` with what failed too. At most `max_in_flight` of its jobs wait or run at a time. The
        other options and `prompt`, or `questions` in its place, are for lines that do not say their own; their priority
        is low.

        Raises `InvalidBatch` where these cannot be used, or not together, and `InvalidJob` for options of no job.
        """
        from keye.producer.batch.opening import open_batch

        batch = open_batch(self, source, output, prompt, endpoint_url=self._settings.s3_endpoint_url, **options)
        batch.start()
        self._batches = (*(each for each in self._batches if not each.done.done()), batch)
        return batch

    def let_go(self, job_ids: Iterable[str]) -> None:
        """Of jobs that were answered, once that is written down elsewhere: they are kept for some minutes more."""
        self._transport.let_go(job_ids)

    def kept_seconds(self) -> float:
        """For how long an ended job is kept that does not say so itself."""
        return self._transport.kept_seconds()

    def watch(self, after: str | None = None, timeout: float | None = None) -> Iterator[EndedJob]:
        """All jobs of all clients as they end: behind the one whose `id` is `after`, or from now on; "0" is the first.

        For who keeps a table of his own: he stores the `id` with what he made of it, and goes on behind it after a
        restart. The feed keeps about the 100,000 newest. Ends after `timeout` seconds, 0 reads what is there.

        Raises `FeedGap` where some of what followed `after` is gone, `InvalidEventId`, and `QueueUnavailable` when
        Redis stays away for a minute.
        """
        return taken(self.follow_feed(after, timeout))

    def follow_ends(self, job_ids: Iterable[str], timeout: float | None) -> Follow:
        return lambda wake: self._transport.reader.follow(EndsFollowing(job_ids, wake, timeout))

    def follow_feed(self, after: str | None, timeout: float | None) -> Follow:
        if after is not None:
            order_of(after)
        return lambda wake: self._transport.reader.follow(FeedFollowing(after, wake, timeout))

    def find(self, job_id: str) -> Job:
        """The handle of a job sent earlier or elsewhere. Raises `JobNotFound`."""
        self._transport.read_record(job_id, "state")
        return self.job(job_id)

    def job(self, job_id: str) -> Job:
        """The handle of a job, without a look whether there is one."""
        return Job(job_id, self._transport)

    def replay(self, job_id: str) -> Job:
        """Queue a job once more that has ended with an answer, as a new one, with the seeds that its result tells.

        It is the same job but for that and its idempotency key, which would lead back to the first. Raises what
        `Job.result` and `submit` raise, and `JobUnreadable`.
        """
        result = self.job(job_id).result(timeout=0)
        (sealed_json,) = self._transport.read_record(job_id, "sealed")
        try:
            job = open_sealed(read_sealed(sealed_json)).job
        except ValueError:
            raise JobUnreadable.of(job_id, "input") from None
        return self.submit(seeded(job, result).model_copy(update={"idempotency_key": None}))

    @property
    def dead_letters(self) -> DeadLetters:
        """The jobs that failed for good."""
        return DeadLetters(self.submit, self._transport)

    @property
    def quarantine(self) -> Quarantine:
        """The messages that no worker could read."""
        return Quarantine(self._transport)

    def status(self) -> FleetStatus:
        """What waits and runs, who is there, and how long it will take."""
        with reaching_redis("be read"):
            return read_status(self._transport.redis)

    def overview(self) -> Overview:
        """The same, and the jobs that run."""
        with reaching_redis("be read"):
            return read_overview(self._transport.redis)

    def job_status(self, job_id: str) -> JobStatus:
        """How far a job is, since when, where and how it ended. Raises `JobNotFound` and `JobUnreadable`."""
        while True:
            record = self._transport.read_record(job_id, *RECORD_FIELDS)
            found = self._transport.progress(job_id)
            # It may have moved on between the two looks.
            if record[0] == found[0]:
                break
        try:
            return JobStatus.of_job(job_id, found, dict(zip(RECORD_FIELDS, record, strict=True)))
        except ValueError:
            raise JobUnreadable.of(job_id, "record") from None

    def list_jobs(
        self,
        states: Iterable[JobState | str] = (),
        codes: Iterable[ErrorCode | str] = (),
        since_seconds: float | None = None,
        older_seconds: float | None = None,
        limit: int | None = 50,
    ) -> Listing:
        """The newest jobs of all clients: those in one of `states`, and that ended with one of `codes` (none: any).

        With `since_seconds` only those submitted within that time, with `older_seconds` those submitted before it. A
        job of which it cannot be read when counts as the oldest. None is no `limit`. Reads all records.
        """
        with reaching_redis("list the jobs"):
            wanted = frozenset(states), frozenset(codes)
            return list_jobs(self._transport.redis, *wanted, since_seconds, older_seconds, limit)

    def cancel_queued(self, job_ids: Iterable[str]) -> Iterator[tuple[str, Cancellation | KeyeError]]:
        """Cancel those of the jobs that are queued, and leave alone those that run by then; what became of each.

        Goes on behind one that Redis refuses to cancel, and raises `QueueUnavailable` once it is away.
        """
        return cancel_queued(self._transport, job_ids)

    def verify(self) -> tuple[Ledger, list[Irregularity]]:
        """All jobs, and those in no legal state; reads everything, and for an operator."""
        with reaching_redis("be read"):
            return verify(self._transport.redis, self._settings.lease_seconds)

    def close(self) -> None:
        """Whoever waits hears it; a batch can be gone on with by another client."""
        for batch in self._batches:
            batch.stop()
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def build_job(fields: Mapping[str, Any], media: Media | None = None) -> AnalysisJob:
    """An `AnalysisJob` from its fields as `Client.submit` takes them. What does not fit goes where `media` says.

    Raises `InvalidJob` with every fault at once, before anything is uploaded, and `UploadFailed`.
    """
    if not isinstance(fields, Mapping):
        raise InvalidJob(f"1 fault: job: Input should be an AnalysisJob or its fields, not {name_kind(fields)}")
    fields = dict(fields)
    with media or Media(None) as media:
        if "media" in fields:
            fields["media"] = media.in_media(fields["media"])
        if "messages" in fields:
            fields["messages"] = media.in_messages(fields["messages"])
        faults = media.faults
        try:
            job = AnalysisJob.model_validate(fields)
        except ValidationError as error:
            faults = faults + faults_of(error)
        if faults:
            raise InvalidJob(list_faults(faults)) from media.cause
        media.upload()
        return job


def _refuse(error: Exception) -> InvalidJob:
    """For what a caller's own objects raise among many jobs: the handles of those already queued must reach him."""
    refusal = InvalidJob(f"1 fault: job: reading it raised {type(error).__name__}: {escaped(str(error))}")
    refusal.__cause__ = error
    return refusal
