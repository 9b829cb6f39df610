"""What a worker process says of itself in Redis: a key that expires when it falls silent."""

from redis import Redis

from keye.config import keys
from keye.config.codes import OpenEnum
from keye.config.contract import Report
from keye.config.outcome import ModelIdentity, WorkerIdentity

# Without a word of its process the key is gone then.
EXPIRY_SECONDS = 20


class WorkerState(OpenEnum):
    LOADING = "loading"
    READY = "ready"
    SICK = "sick"
    DRAINING = "draining"


class StarvedSeconds(Report):
    """How long an engine had room for another sequence while jobs of its worker were prepared, by what they lacked."""

    fetch: float = 0
    decode: float = 0
    memory: float = 0
    company: float = 0


class EngineUse(Report):
    """How many sequences run now and how full the KV cache is, in blocks (0 of 0 where a worker does not tell), and for
    how many of the `seconds` since it takes jobs it was starved.
    """

    running: int
    max_running: int
    seconds: float
    starved_seconds: StarvedSeconds
    kv_blocks_used: int = 0
    num_kv_blocks: int = 0


class Presence(Report):
    """What the key holds; `model` and `engine` are unset until it is loaded, and so is how many tokens a job may have
    here.

    Of these the chat template takes `template_tokens` at least. `warnings` are for a person: what this worker had to do
    without; `sickness` is why it takes no jobs.
    """

    worker: WorkerIdentity
    state: WorkerState
    model: ModelIdentity | None = None
    max_tokens: int | None = None
    template_tokens: int = 0
    engine: EngineUse | None = None
    sickness: str = ""
    warnings: tuple[str, ...] = ()


def list_present(redis: Redis) -> list[Presence]:
    """Every worker process that has spoken within its time."""
    with redis.pipeline(transaction=False) as reading:
        for key in redis.scan_iter(keys.WORKERS):
            reading.get(key)
            reading.pttl(key)
        answers = iter(reading.execute())
    # One that would live longer was left by a process that died before the server's clock was set back.
    return [
        Presence.model_validate_json(content)
        for content, left_ms in zip(answers, answers, strict=True)
        if content is not None and left_ms <= EXPIRY_SECONDS * 1000
    ]
