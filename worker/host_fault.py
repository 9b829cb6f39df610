"""Faults of the place in which a worker runs: its disk, files, threads, memory, device. The job that meets one is not
to blame, and another worker may well answer it.
"""

import errno
from collections.abc import Iterator

# What a library may have wrapped into an error of its own that blames something else, such as a store.
_OF_HOST = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO),
        *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOLCK),
    }
)


class HostFault(Exception):
    """Its text is for the operator: what failed, the value, the limit, the next move. `kind` is what callers may read.

    `is_final` is one that no wait cures in this process, only a fresh one.
    """

    def __init__(self, reason: str, *, kind: str = "the worker's log says which", is_final: bool = False) -> None:
        super().__init__(reason)
        self.kind = kind
        self.is_final = is_final


def host_fault_of(error: BaseException) -> HostFault | None:
    """The fault of the host that this error is or tells of; None where it is another.

    What a caller, a medium or a store is to blame for has been made a `Fault` where it was met: an `OSError` that is
    still one is of the host, whatever its number.
    """
    if isinstance(error, HostFault):
        return error
    if isinstance(error, OSError):
        return _of_system(error)
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return HostFault("No more threads can be started. Raise the limit on processes, or lower KEYE_CONCURRENCY.")
    cause = wrapped_os_error(error)
    return None if cause is None else _of_system(cause)


def _of_system(error: OSError) -> HostFault:
    # Without the path in its text, which is the operator's.
    return HostFault(str(error), kind=error.strerror or type(error).__name__)


def wrapped_os_error(error: BaseException) -> OSError | None:
    """An `OSError` that this error stems from and that only the host is to blame for, such as a lack of files."""
    return next((e for e in _chain(error) if isinstance(e, OSError) and e.errno in _OF_HOST), None)


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    waiting: list[object] = [error]
    while waiting:
        each = waiting.pop()
        if not isinstance(each, BaseException) or id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        waiting += [each.__cause__, None if each.__suppress_context__ else each.__context__]
        # Where urllib3 and botocore keep it.
        waiting += [getattr(each, "reason", None), getattr(each, "kwargs", {}).get("error")]
