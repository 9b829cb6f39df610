"""What is wrong with a medium, and what sentences call it, which is put before each sentence in one place: `named`."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from keye.config.codes import ErrorCode
from keye.config.faults import Fault
from keye.config.faults import MediumFault as MediumFault

_MAX_LENGTH = 160
_INLINE_TYPE = re.compile(r"data:([\w.+-]{1,40}/[\w.+-]{1,40})?", re.IGNORECASE)
_WEB = re.compile(r"https:/*(?:[^/?#]*@)?([^?#]*)", re.IGNORECASE)

log = logging.getLogger(__name__)


corrupt = partial(MediumFault, ErrorCode.MEDIA_CORRUPT)
forbidden = partial(MediumFault, ErrorCode.MEDIA_FORBIDDEN)
not_found = partial(MediumFault, ErrorCode.MEDIA_NOT_FOUND)
too_large = partial(MediumFault, ErrorCode.MEDIA_TOO_LARGE)
unreachable = partial(MediumFault, ErrorCode.MEDIA_UNREACHABLE)
unsupported = partial(MediumFault, ErrorCode.MEDIA_UNSUPPORTED)


@contextmanager
def named(name: str) -> Iterator[None]:
    """Around all that is done to a medium: a `MediumFault` becomes a `Fault` that begins with `name`.

    Any other fault is not the medium's, or has its name already.
    """
    try:
        yield
    except MediumFault as fault:
        if cause := fault.__cause__:
            log.warning("%s: %s while it was decoded", name, type(cause).__name__, exc_info=cause)
        raise Fault(fault.code, f"{name}: {fault}", retry_after_seconds=fault.retry_after_seconds) from None


def name_medium(uri: str) -> str:
    """The reference without query, credentials or inline bytes: signed URLs carry their secrets there."""
    if inline := _INLINE_TYPE.match(uri):
        return f"inline {inline[1] or 'data'}"
    if web := _WEB.match(uri):
        uri = f"https://{web[1]}"
    elif uri[:3].lower() == "s3:":
        uri = uri.partition("?")[0]
    return uri if len(uri) <= _MAX_LENGTH else f"{uri[: _MAX_LENGTH // 2]}...{uri[-_MAX_LENGTH // 2 :]}"
