"""What a worker process counts, in the files of its supervisor's folder, which serves all workers' together.

A file belongs to a worker's name, not to its process: a worker that is started again counts on. Where nobody
supervises, as in tests, nothing is written.
"""

import os

from prometheus_client import Counter, Gauge, Histogram, values

from keye.config.outcome import JobResult, Outcome
from keye.worker.telemetry.health import NAME_VARIABLE

# Taken out: a process that this one starts would write to the same files.
WORKER = os.environ.pop(NAME_VARIABLE, "")
if WORKER:
    values.ValueClass = values.MultiProcessValue(lambda: WORKER)

# Jobs take a tenth of a second (a small picture) to an hour (a long video on a CPU).
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 900, 3600)


def _counter(name: str, what: str, *labels: str) -> Counter:
    return Counter(f"keye_{name}", what, labels, registry=None)


def _histogram(name: str, what: str, *labels: str) -> Histogram:
    return Histogram(f"keye_{name}", what, labels, registry=None, buckets=_SECONDS)


def _gauge(name: str, what: str, *labels: str) -> Gauge:
    return Gauge(f"keye_{name}", what, ("worker", *labels), registry=None, multiprocess_mode="livemax")


JOBS = _counter("jobs", "Jobs that a worker ended, by outcome and error code", "outcome", "code")
RETRIES = _counter("retries", "Attempts that failed and are followed by another, by their code", "code")
OUTCOMES_LOST = _counter("outcomes_lost", "Outcomes that neither Redis nor the disk took before their process ended")
HOST_FAULTS = _counter("host_faults", "Jobs that met a fault of a worker's host, such as a full disk")
REAPED = _counter("reaped", "Jobs taken from workers that died under them")
LATE_RENEWALS = _counter("late_renewals", "Renewals of leases that came more than two thirds of a lease after the last")
PREEMPTIONS = _counter("preemptions", "Generations that gave their KV blocks up to others, to begin again")
OUT_OF_MEMORY = _counter("out_of_memory", "Steps that did not fit into the device's memory")
ENGINE_STEPS = _counter("engine_steps", "Steps of the engine")
ENGINE_BUSY_SECONDS = _counter("engine_busy_seconds", "Seconds that the engine was in a step")
STARVED_SECONDS = _counter(
    "starved_seconds", "Seconds that the engine had room for another sequence while jobs here were prepared", "cause"
)
PROMPT_TOKENS = _counter("prompt_tokens", "Tokens of the prompts of answered jobs")
CACHED_TOKENS = _counter("cached_tokens", "Of the tokens of those prompts, those found in the cache")
GENERATED_TOKENS = _counter("generated_tokens", "Tokens of the answers of answered jobs")
FRAMES = _counter("frames", "Pictures and frames of videos that answered jobs saw")
CACHE_HITS = _counter("cache_hits", "Media found in the cache")
CACHE_MISSES = _counter("cache_misses", "Media that had to be fetched")
FRAMES_CACHE_HITS = _counter("frames_cache_hits", "Media that were decoded before, or are for another job")
FRAMES_CACHE_MISSES = _counter("frames_cache_misses", "Media that had to be decoded")
LOG_LINES_DROPPED = _counter(
    "log_lines_dropped", "Lines of workers' logs that were lost: a full disk, a slow reader or none"
)
FETCHED_BYTES = _counter("fetched_bytes", "Bytes of media that were fetched")

QUEUE_WAIT = _histogram("queue_wait_seconds", "From submitting a job to the claim of the attempt that answered it")
STAGES = _histogram("stage_seconds", "Stages of answered jobs", "stage")
FIRST_TOKEN = _histogram("time_to_first_token_seconds", "From submitting a job to the first token of its answer")
JOB_SECONDS = _histogram("job_seconds", "From submitting a job to its answer")

RUNNING = _gauge("running_sequences", "Generations in the engine's batch")
WAITING = _gauge("waiting_sequences", "Generations that wait for the engine")
KV_BLOCKS = _gauge("kv_blocks", "Blocks of the KV cache", "state")
DECODERS = _gauge("decoders", "Processes that decode media", "state")
STEP_TOKENS = _gauge("learnt_token_limit", "Most tokens a step may have, lowered where memory ran out")
CACHE_BYTES = _gauge("cache_bytes", "Bytes of the media cache, which the workers of a host share")
FRAMES_CACHE_BYTES = _gauge("frames_cache_bytes", "Bytes of decoded media that are kept for the next jobs")
UNSAFE_BROKER = _gauge("unsafe_broker", "1 while Redis is set so that it may drop or lose jobs", "subject")
BUILD = _gauge("build_info", "1", "version", "torch", "transformers", "model", "precision", "attention")


def count_outcome(outcome: Outcome) -> None:
    """Of a job that has been settled."""
    JOBS.labels(outcome.state.lower(), "" if isinstance(outcome, JobResult) else outcome.code).inc()
    if not isinstance(outcome, JobResult):
        return
    spent = outcome.timings
    stages = ("fetch", "decode", "prepare", "generate") if outcome.media else ("prepare", "generate")
    for stage in stages:
        STAGES.labels(stage).observe(getattr(spent, stage))
    QUEUE_WAIT.observe(spent.queued)
    JOB_SECONDS.observe(spent.queued + spent.total)
    if spent.first_token is not None:
        FIRST_TOKEN.observe(spent.queued + spent.total - spent.generate + spent.first_token)
    PROMPT_TOKENS.inc(outcome.usage.prompt_tokens)
    CACHED_TOKENS.inc(outcome.usage.cached_tokens)
    GENERATED_TOKENS.inc(outcome.usage.completion_tokens)
    FRAMES.inc(sum(medium.frames for medium in outcome.media))
