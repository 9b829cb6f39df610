"""How jobs reach Redis, and what is read of them there: their records and their events."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, repeat
from typing import Any, cast

from redis.exceptions import OutOfMemoryError, RedisError

from keye.config import keys
from keye.config.codes import JobState
from keye.config.connection import ArgumentTooLarge, check_arguments, connect
from keye.config.event import JobEvent, read_event
from keye.config.faults import IdempotencyConflict, InvalidJob, JobNotFound, QueueUnavailable, Refusal
from keye.config.job import AnalysisJob
from keye.config.scripts import load_script
from keye.config.settings import ProducerSettings
from keye.config.topology import message, message_list
from keye.config.wire import JobOutline, SealedJob


def fingerprint_of(job: AnalysisJob) -> str:
    """The same for two jobs that ask for the same thing."""
    canonical = json.dumps(job.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


class Transport:
    """Connections to one Redis. Threads may share it; a forked child opens connections of its own."""

    def __init__(self, settings: ProducerSettings) -> None:
        self.result_ttl_seconds = settings.result_ttl_seconds
        self.redis = connect(settings.redis_url.get_secret_value(), retry_pause_seconds=0.5)
        self._submit = load_script(self.redis, "submit")
        self._end_queued = load_script(self.redis, "end_queued")

    def submit(self, sealed: SealedJob) -> str:
        """Store and queue a new job; returns the id of the job that owns its idempotency key, this or an earlier one.

        Raises `IdempotencyConflict` where that one asks for something else, and `InvalidJob` where the new tokens alone
        are all that the live workers hold for a job, or where Redis does not take a message of its size.
        """
        with reaching_redis("queue the job"):
            reply = self._submit(*self._submission(sealed))
        if isinstance(answer := _answer(sealed, reply), Refusal):
            raise answer
        return answer

    def submit_many(self, jobs: Sequence[SealedJob | Refusal]) -> list[str | Refusal]:
        """As `submit` for each, in one round trip; what it would raise stands where the id would, as refusals do."""
        accepted = list(jobs)
        replies: Iterator[Any]
        with self.redis.pipeline(transaction=False) as sending:
            try:
                for index, job in enumerate(jobs):
                    if isinstance(job, SealedJob):
                        try:
                            self._submit(*self._submission(job), client=sending)
                        except InvalidJob as refusal:
                            accepted[index] = refusal
                replies = iter(sending.execute(raise_on_error=False))
            except RedisError as error:
                replies = repeat(error)
        return [job if isinstance(job, Refusal) else _answer(job, next(replies)) for job in accepted]

    def cancel(self, job_id: str, job: JobOutline, outcome_json: str) -> str | None:
        """Cancel by the script `end_queued`; returns the state the job was found in."""
        waiting = (keys.LEASES, keys.queued(job.priority), keys.DEADLINES)
        names = [keys.record(job_id), keys.events(job_id), *waiting, *keys.idempotency_of(job.idempotency_key)]
        args = (job_id, JobState.CANCELLED.value, outcome_json, self.result_ttl_seconds, keys.CANCELLATIONS)
        with reaching_redis("cancel the job"):
            return cast(str | None, self._end_queued(keys=names, args=args))

    def read_record(self, job_id: str, *fields: str) -> list[str]:
        """These fields of the job's record, "" for what is not there. Raises `JobNotFound` where the first is not."""
        with reaching_redis("read the job"):
            values = cast(list[str | None], self.redis.hmget(keys.record(job_id), list(fields)))
        if values[0] is None:
            raise JobNotFound.of(job_id)
        return [value or "" for value in values]

    def read_events(self, job_id: str, after: str, block_seconds: float | None) -> list[tuple[str, JobEvent | None]]:
        """Events behind the entry `after`, with their entry ids; None for one of a type that only newer releases know.

        Waits for the first one for `block_seconds`, if set, which must stay below the socket's timeout.
        """
        # Zero would block for ever.
        block_ms = None if block_seconds is None else max(1, int(block_seconds * 1000))
        with reaching_redis("read the job's events"):
            streams: Any = self.redis.xread({keys.events(job_id): after}, block=block_ms)
        # RESP2 answers with pairs, RESP3 with a map.
        batches = dict(streams).values() if streams else ()
        return [(entry_id, read_event(fields["event"])) for batch in batches for entry_id, fields in batch]

    def _submission(self, sealed: SealedJob) -> tuple[list[str], list[str | int]]:
        """Keys and arguments of the script `submit`. Raises `InvalidJob` where Redis takes none of that size."""
        job, job_id, record = sealed.job, sealed.job_id, sealed.record
        queue = (keys.queued(job.priority), message_list(job.priority))
        names = [keys.record(job_id), keys.CONTEXT, *queue, keys.DEADLINES]
        names += keys.idempotency_of(job.idempotency_key)
        args: list[str | int] = [job_id, fingerprint_of(job), job.generation.max_new_tokens, record["deadline_at"]]
        args += [message(job_id, sealed.model_dump(mode="json"), job.priority), *chain.from_iterable(record.items())]
        try:
            check_arguments(self.redis, args)
        except ArgumentTooLarge as fault:
            raise InvalidJob(
                f"1 fault: job: its message has {fault}. Upload media that it holds inside (data: URIs) and give their "
                "URIs, or have that setting raised."
            ) from None
        return names, args


def _answer(sealed: SealedJob, reply: list[str] | RedisError) -> str | Refusal:
    """The id in the script's reply, or what `Transport.submit` raises."""
    job = sealed.job
    match reply:
        case RedisError() as error:
            return unavailable("queue the job", error)
        case ["too_long", context]:
            return InvalidJob(
                f"1 fault: generation.max_new_tokens: {job.generation.max_new_tokens} leaves no room for a prompt, "
                f"the workers hold {context} tokens for one job"
            )
        case [_, entry]:
            job_id, fingerprint = entry.split(" ")
    if job_id != sealed.job_id and fingerprint != fingerprint_of(job):
        return IdempotencyConflict(
            f"The idempotency key {job.idempotency_key!r} belongs to a job that asks for something else. "
            "Send the same job again, or use another key."
        )
    return job_id


@contextmanager
def reaching_redis(action: str) -> Iterator[None]:
    """Redis' errors become `QueueUnavailable`; `action` completes "Redis could not ..."."""
    try:
        yield
    except RedisError as error:
        raise unavailable(action, error) from error


def unavailable(action: str, cause: RedisError) -> QueueUnavailable:
    remedy = "Check KEYE_REDIS_URL and that the server runs."
    if isinstance(cause, OutOfMemoryError):
        remedy = "It is full: give it more memory, or keep results for less long (KEYE_RESULT_TTL_SECONDS)."
    return QueueUnavailable(f"Redis could not {action} ({str(cause).rstrip('.')}). {remedy}")
