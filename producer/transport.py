"""How the producer talks to Redis: records, events and scripts by redis-py, the message by Celery. Media: `upload`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from celery import Celery
from kombu.exceptions import OperationalError
from redis import Redis
from redis.backoff import ExponentialBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from config import keys
from config.event import EVENT, JobEvent
from config.job import AnalysisJob
from config.settings import Settings
from config.topology import ANALYZE_TASK, QUEUE, celery_options
from config.wire import InvalidJob
from producer.envelope import Envelope
from producer.errors import QueueUnavailable

SOCKET_TIMEOUT_SECONDS = 5.0

SCRIPTS = Path(__file__).parent / "scripts"


class Transport:
    """Connections to one Redis. Threads may share it; a forked child opens connections of its own."""

    def __init__(self, settings: Settings) -> None:
        url = settings.redis_url.get_secret_value()
        self._result_ttl_seconds = settings.result_ttl_seconds
        self._lease_seconds = settings.lease_seconds
        self.redis = connect(url)
        self._submit, self._published, self._withdraw, self._cancel, self._purge = (
            self.redis.register_script((SCRIPTS / f"{name}.lua").read_text())
            for name in ("submit", "published", "withdraw", "cancel", "purge")
        )
        self._celery = publishing_app(settings)

    def write_record(self, envelope: Envelope) -> tuple[str, str]:
        """Store a new job; returns (job_id, fingerprint) of the job that owns its idempotency key.

        Raises `InvalidJob` where the new tokens alone exceed the context that the workers have told of.
        """
        job = envelope.sealed.job
        fields = [text for pair in envelope.sealed.record.items() for text in pair]
        max_new_tokens = job.generation.max_new_tokens
        with reaching_redis("store the job"):
            answer: tuple[str, str] = self._submit(
                keys=[
                    *(keys.record(envelope.job_id), keys.leases(), keys.context(), keys.deadlines()),
                    *idempotency_keys(job),
                ],
                args=[
                    *(envelope.job_id, envelope.fingerprint, self._lease_seconds, max_new_tokens),
                    *(envelope.sealed.record["deadline_at"], *fields),
                ],
            )
        match answer:
            case ["too_long", context]:
                raise InvalidJob(
                    f"1 fault: generation.max_new_tokens: {max_new_tokens} leaves no room for a prompt, "
                    f"the model's context is {context} tokens"
                )
            case [_, entry]:
                job_id, fingerprint = entry.split(" ")
        return job_id, fingerprint

    def publish(self, envelope: Envelope) -> None:
        with reaching_redis("queue the job"):
            self._celery.send_task(
                ANALYZE_TASK,
                kwargs=envelope.message,
                # The headers would repeat the whole job, signed URLs included.
                kwargsrepr="{...}",
                task_id=envelope.job_id,
                queue=QUEUE,
                priority=envelope.priority_step,
            )

    def confirm_published(self, envelope: Envelope) -> None:
        names = [keys.record(envelope.job_id), keys.leases(), keys.queued(envelope.sealed.job.priority)]
        with reaching_redis("confirm that the job is queued"):
            self._published(keys=names, args=[envelope.job_id, 0])

    def withdraw(self, envelope: Envelope) -> bool:
        """Take back what `write_record` stored; False when a worker has the job already."""
        names = [keys.record(envelope.job_id), keys.leases(), keys.deadlines(), *idempotency_keys(envelope.sealed.job)]
        with reaching_redis("take the job back"):
            return bool(self._withdraw(keys=names, args=[envelope.job_id]))

    def cancel(self, job_id: str, job: AnalysisJob, outcome_json: str) -> str | None:
        """Cancel by `scripts/cancel.lua`; returns the state the job was found in."""
        waiting = (keys.leases(), keys.queued(job.priority), keys.deadlines())
        names = [keys.record(job_id), keys.events(job_id), *waiting, *idempotency_keys(job)]
        args = (job_id, outcome_json, self._result_ttl_seconds, keys.cancellations())
        with reaching_redis("cancel the job"):
            return cast(str | None, self._cancel(keys=names, args=args))

    def read_record(self, job_id: str, *fields: str) -> tuple[str | None, ...]:
        """The named fields of the job's record, None for what is not there."""
        with reaching_redis("read the job"):
            return tuple(cast(list[str | None], self.redis.hmget(keys.record(job_id), list(fields))))

    def list_dead_letters(self, since: float) -> list[str]:
        """Ids of jobs that failed at `since` (Unix seconds) or later, oldest first."""
        with reaching_redis("list the dead letters"):
            return cast(list[str], self.redis.zrangebyscore(keys.dead_letters(), since, "+inf"))

    def read_dead_letter(self, job_id: str) -> dict[str, str] | None:
        """The whole record of a job that failed; None where there is no such dead letter."""
        with reaching_redis("read the dead letter"), self.redis.pipeline() as reading:
            reading.zscore(keys.dead_letters(), job_id)
            reading.hgetall(keys.record(job_id))
            score, record = reading.execute()
        return record if score is not None and record else None

    def close_dead_letter(self, job_id: str, requeued_as: str) -> None:
        """The job was sent once more: its record goes as that of any ended job."""
        with reaching_redis("close the dead letter"), self.redis.pipeline() as closing:
            closing.zrem(keys.dead_letters(), job_id)
            closing.hset(keys.record(job_id), "requeued_as", requeued_as)
            closing.expire(keys.record(job_id), self._result_ttl_seconds)
            closing.expire(keys.events(job_id), self._result_ttl_seconds)
            closing.execute()

    def purge_dead_letter(self, job_id: str, idempotency_key: str | None) -> None:
        names = [keys.record(job_id), keys.events(job_id), keys.dead_letters()]
        if idempotency_key is not None:
            names.append(keys.idempotency(idempotency_key))
        with reaching_redis("purge the dead letter"):
            self._purge(keys=names, args=[job_id])

    def read_events(self, job_id: str, after: str, block_seconds: float | None) -> list[tuple[str, JobEvent]]:
        """Events behind the entry `after`, with their entry ids; waits for the first one if `block_seconds` is set.

        `block_seconds` must stay below the socket's timeout.
        """
        # Zero would block for ever.
        block_ms = None if block_seconds is None else max(1, int(block_seconds * 1000))
        with reaching_redis("read the job's events"):
            streams: Any = self.redis.xread({keys.events(job_id): after}, block=block_ms)
        # RESP2 answers with pairs, RESP3 with a map.
        batches = dict(streams).values() if streams else ()
        return [(entry_id, EVENT.validate_json(fields["event"])) for batch in batches for entry_id, fields in batch]

    def close(self) -> None:
        self.redis.close()
        self._celery.close()


def connect(url: str) -> Redis:
    try:
        return Redis.from_url(
            url,
            decode_responses=True,
            socket_timeout=SOCKET_TIMEOUT_SECONDS,
            socket_connect_timeout=SOCKET_TIMEOUT_SECONDS,
            health_check_interval=30,
            retry=Retry(ExponentialBackoff(cap=1.0, base=0.05), 3),
        )
    except ValueError:
        # Without its words: they may quote the password.
        raise ValueError(
            "The URL of Redis (KEYE_REDIS_URL) cannot be read. Write redis://:password@host:6379/0, with %40 for an @ "
            "in the password, %23 for a #, %2F for a /."
        ) from None


def publishing_app(settings: Settings) -> Celery:
    """A Celery app that publishes and nothing else; the caller's own Celery app, if any, stays the current one."""
    options = celery_options(
        settings.redis_url.get_secret_value(), settings.result_ttl_seconds, settings.lease_seconds
    ) | {
        # With a result backend, every message sent would subscribe a connection to its result.
        "result_backend": None,
        "task_publish_retry_policy": {"max_retries": 3, "interval_start": 0, "interval_step": 0.2, "interval_max": 0.5},
    }
    app = Celery("keye-producer", set_as_current=False)
    app.conf.update(options)
    return app


def idempotency_keys(job: AnalysisJob) -> list[str]:
    """The entry of the job's idempotency key, for the jobs that have one."""
    return [keys.idempotency(job.idempotency_key)] if job.idempotency_key else []


@contextmanager
def reaching_redis(action: str) -> Iterator[None]:
    """Redis' and kombu's errors become ours; `action` completes "Redis could not ..."."""
    try:
        yield
    except (RedisError, OperationalError) as error:
        raise QueueUnavailable(action, error) from error
