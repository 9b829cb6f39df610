"""What one download may take, wherever it comes from: bytes, time, the patience of its job."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC
from email.utils import parsedate_to_datetime

from keye.worker.media.faults import MediumFault, unreachable


@dataclass(frozen=True, slots=True)
class Transfer:
    """`max_seconds` are from its making; what `check` raises ends the download."""

    max_bytes: int
    timeout_seconds: float
    max_seconds: float
    check: Callable[[], None]
    began_at: float = field(default_factory=time.monotonic)

    @property
    def seconds_left(self) -> float:
        return max(0.0, self.began_at + self.max_seconds - time.monotonic())

    @property
    def patience_seconds(self) -> float:
        """How long to wait for one thing that nothing else ends."""
        return max(0.001, min(self.timeout_seconds, self.seconds_left))

    def go_on(self) -> None:
        """Called with every piece that comes."""
        self.check()
        if not self.seconds_left:
            raise self.too_slow()

    def too_slow(self) -> MediumFault:
        return unreachable(
            f"had not come whole after {self.max_seconds:g} s (KEYE_MAX_FETCH_SECONDS). "
            "Send a smaller one, or keep it nearer to the worker."
        )


def read_retry_after(header: str | None) -> float | None:
    """Seconds from now, as told in seconds or as an HTTP date (RFC 9110, 10.2.3); None where it tells neither."""
    if header is None:
        return None
    if header.strip().isdecimal():
        return float(header)
    try:
        date = parsedate_to_datetime(header)
        # Its older forms name no zone, and mean UTC as the newer ones do.
        return max(0.0, date.replace(tzinfo=date.tzinfo or UTC).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None
