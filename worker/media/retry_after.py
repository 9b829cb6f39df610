"""The Retry-After header: how long a store asks to be left alone."""

import time
from email.utils import parsedate_to_datetime


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
