"""What is wrong with a medium, and what sentences call it, which is put before each sentence in one place: `named`."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from keye.config.codes import ErrorCode
from keye.config.faults import Fault
from keye.config.faults import MediumFault as MediumFault
from keye.config.medium_name import name_medium as name_medium

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
