"""Whether a failed attempt is worth another, when, and with how much of the media. Pure: `analyze` acts on it."""

from dataclasses import dataclass

from keye.config.codes import ErrorCode
from keye.config.faults import Fault
from keye.worker.leases.job_lease import Claimed

# Only what passes by itself or can be made smaller. INTERNAL is not: a fault of ours comes again, and its caller waits.
_RETRIED = (ErrorCode.MEDIA_UNREACHABLE, ErrorCode.OUT_OF_MEMORY)

FIRST_PAUSE_SECONDS = 4.0
MAX_PAUSE_SECONDS = 120.0
# However long a store asks to be left alone: it may be back sooner, and callers wait.
MAX_RETRY_AFTER_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class RetryDecision:
    """Try again after `pause_seconds`; `max_visual_tokens` bounds what the model is shown then, None leaves it."""

    pause_seconds: float
    max_visual_tokens: int | None = None


def decide_retry(
    fault: Fault, lease: Claimed, num_visual_tokens: int, seconds_to_deadline: float, jitter: float
) -> RetryDecision | None:
    """The next attempt, or None where this failure is the job's outcome. `jitter` is evenly drawn from [0, 1).

    `num_visual_tokens` is 0 where the attempt failed before its prompt was built.

    The pause is full jitter under an exponential ceiling, so that the jobs of one outage do not come back as one wave;
    what the store asked for by Retry-After comes on top, an hour at most. No attempt begins behind the job's deadline.
    """
    if fault.code not in _RETRIED or lease.attempt >= lease.max_attempts:
        return None
    pause = jitter * min(FIRST_PAUSE_SECONDS * 2 ** (lease.attempt - 1), MAX_PAUSE_SECONDS)
    if fault.retry_after_seconds is not None:
        pause += min(fault.retry_after_seconds, MAX_RETRY_AFTER_SECONDS)
    if pause >= seconds_to_deadline:
        return None
    if fault.code is not ErrorCode.OUT_OF_MEMORY:
        return RetryDecision(pause)
    # Of text alone nothing can be left out.
    max_visual_tokens = num_visual_tokens // 2
    return RetryDecision(pause, max_visual_tokens) if max_visual_tokens else None
