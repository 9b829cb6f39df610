"""Whether a failed attempt is worth another, when, and with how much of the media. Pure: `analyze` acts on it."""

from dataclasses import dataclass

from keye.config.codes import ErrorCode
from keye.config.faults import Fault
from keye.config.job import DEFAULT_MAX_ATTEMPTS, AnalysisJob
from keye.worker.leases.claims import Claimed

# Only what passes by itself or can be made smaller. INTERNAL is not: a fault of ours comes again, and its caller waits.
_RETRIED = (ErrorCode.MEDIA_UNREACHABLE, ErrorCode.OUT_OF_MEMORY)

FIRST_PAUSE_SECONDS = 4.0
MAX_PAUSE_SECONDS = 120.0
# Of one job in one place, the first beside others.
MAX_HOST_FAULTS = 3
# However long a store asks to be left alone: it may be back sooner, and callers wait.
MAX_RETRY_AFTER_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class RetryDecision:
    """Try again after `pause_seconds`; `max_visual_tokens` bounds what the model is shown then, None leaves it.

    `counts` is whether the attempt that failed is one of the job's `max_attempts`.
    """

    pause_seconds: float
    max_visual_tokens: int | None = None
    counts: bool = True


def window_of(job: AnalysisJob, lease: Claimed, media_retry_seconds: float) -> float | None:
    """How long the job's media are tried again while they are unreachable; None where attempts are counted instead.

    A record of fewer than the default is of a producer that wrote into it what the job does not say.
    """
    is_set = job.max_attempts is not None or lease.max_attempts < DEFAULT_MAX_ATTEMPTS
    return None if is_set else media_retry_seconds


def decide_retry(
    fault: Fault, lease: Claimed, num_visual_tokens: int, seconds: float, window_seconds: float | None, jitter: float
) -> RetryDecision | None:
    """The next attempt, or None where this failure is the job's outcome. `jitter` is evenly drawn from [0, 1).

    `num_visual_tokens` is 0 where the attempt failed before its prompt was built; it failed `seconds` after its claim.

    The pause is full jitter under an exponential ceiling, so that the jobs of one outage do not come back as one wave;
    what the store asked for by Retry-After comes on top, an hour at most. No attempt begins behind the job's deadline.

    Within `window_seconds` of the first failure to get them, unreachable media cost none of the job's attempts. The
    last is at the window's end, so that a shorter outage costs no job; three there are, whatever it asks for.
    """
    if fault.code not in _RETRIED:
        return None
    asked_for = min(fault.retry_after_seconds or 0.0, MAX_RETRY_AFTER_SECONDS)
    # Attempts may come to thousands, and no float holds two to the power of that.
    pause = asked_for + jitter * min(FIRST_PAUSE_SECONDS * 2 ** min(lease.attempt - 1, 16), MAX_PAUSE_SECONDS)
    counts = window_seconds is None or fault.code is not ErrorCode.MEDIA_UNREACHABLE
    if counts:
        if lease.attempt >= lease.max_attempts:
            return None
    elif asked_for < (left := (window_seconds or 0) - seconds_unreachable(lease, seconds)):
        pause = min(pause, left)
    elif lease.num_unreachable + 1 >= DEFAULT_MAX_ATTEMPTS:
        return None
    if lease.seconds_to_deadline is not None and pause >= lease.seconds_to_deadline - seconds:
        return None
    if fault.code is not ErrorCode.OUT_OF_MEMORY:
        return RetryDecision(pause, counts=counts)
    # Of text alone nothing can be left out.
    max_visual_tokens = num_visual_tokens // 2
    return RetryDecision(pause, max_visual_tokens) if max_visual_tokens else None


def is_to_blame(lease: Claimed, place: str) -> bool:
    """Whether the job itself causes the fault of the host that it met in this place, which is fit for others.

    It ran alone, so no neighbour did; and it met one in another place before, or here so often.
    """
    before = dict(lease.host_faults)
    return lease.is_alone and (before.pop(place, 0) >= MAX_HOST_FAULTS or bool(before))


def seconds_unreachable(lease: Claimed, seconds: float) -> float:
    """For how long the media have been, `seconds` after the claim; the server's clock may have been set back."""
    return 0.0 if lease.unreachable_since is None else max(0.0, lease.claimed_at + seconds - lease.unreachable_since)


def tell_tries(lease: Claimed, seconds: float, window_seconds: float | None) -> str:
    """What follows the sentence of a failure to get the media that is the last: how often and how long it was tried."""
    limit = "its max_attempts" if window_seconds is None else f"KEYE_MEDIA_RETRY_SECONDS, {window_seconds:g} s"
    limit += " or its deadline" if lease.deadline_at is not None else ""
    tried = f"{lease.num_unreachable + 1} times in {seconds_unreachable(lease, seconds):.0f} s"
    return f"It was tried {tried} (limit: {limit}). Send it again once the store answers."
