"""What one download may take, wherever it comes from: bytes, time, and the patience of the job it is for."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from config.error_codes import ErrorCode
from worker.media.fault import MediaFault


@dataclass(frozen=True, slots=True)
class Transfer:
    """`ends_at` is a time.monotonic(); what `check` raises ends the download. `name` is what messages call it."""

    name: str
    max_bytes: int
    timeout_seconds: float
    ends_at: float
    check: Callable[[], None]

    @property
    def seconds_left(self) -> float:
        return max(0.0, self.ends_at - time.monotonic())

    def go_on(self) -> None:
        """Called with every piece that comes."""
        self.check()
        if not self.seconds_left:
            raise self.too_slow()

    def too_slow(self) -> MediaFault:
        return MediaFault(
            ErrorCode.MEDIA_UNREACHABLE, f"{self.name}: did not come whole in time (KEYE_MAX_FETCH_SECONDS)."
        )
