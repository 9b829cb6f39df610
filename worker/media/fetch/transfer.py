"""What one download may take, wherever it comes from: bytes, time, the patience of its job; and what it is called."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime

from keye.config.codes import ErrorCode
from keye.config.faults import Fault


@dataclass(frozen=True, slots=True)
class Transfer:
    """`max_seconds` are from its making; what `check` raises ends the download. `name` is what messages call it."""

    name: str
    max_bytes: int
    timeout_seconds: float
    max_seconds: float
    check: Callable[[], None]
    began_at: float = field(default_factory=time.monotonic)

    @property
    def seconds_left(self) -> float:
        return max(0.0, self.began_at + self.max_seconds - time.monotonic())

    def go_on(self) -> None:
        """Called with every piece that comes."""
        self.check()
        if not self.seconds_left:
            raise self.too_slow()

    def too_slow(self) -> Fault:
        return Fault(
            ErrorCode.MEDIA_UNREACHABLE,
            f"{self.name}: had not come whole after {self.max_seconds:g} s (KEYE_MAX_FETCH_SECONDS). "
            "Send a smaller one, or keep it nearer to the worker.",
        )


def read_retry_after(header: str | None) -> float | None:
    """Seconds from now, as told in seconds or as an HTTP date (RFC 9110, 10.2.3); None where it tells neither."""
    if header is None:
        return None
    if header.strip().isdecimal():
        return float(header)
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return None


_MAX_LENGTH = 160
_INLINE_TYPE = re.compile(r"data:([\w.+-]{1,40}/[\w.+-]{1,40})?", re.IGNORECASE)
_WEB = re.compile(r"https:/*(?:[^/?#]*@)?([^?#]*)", re.IGNORECASE)


def name_medium(uri: str) -> str:
    """The reference without query, credentials or inline bytes: signed URLs carry their secrets there."""
    if inline := _INLINE_TYPE.match(uri):
        return f"inline {inline[1] or 'data'}"
    if web := _WEB.match(uri):
        uri = f"https://{web[1]}"
    elif uri[:3].lower() == "s3:":
        uri = uri.partition("?")[0]
    return uri if len(uri) <= _MAX_LENGTH else f"{uri[: _MAX_LENGTH // 2]}...{uri[-_MAX_LENGTH // 2 :]}"
