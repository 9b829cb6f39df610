"""What this process or its host lacks, such as files to open, behind errors that blame a store, a server or a file."""

import errno
import socket

from keye.worker.host_fault import wrapped_os_error


def is_lack(fault: OSError) -> bool:
    """Whether it says nothing about the file that was to be opened."""
    return fault.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def raise_lack(error: BaseException | None = None) -> None:
    """Raises the `OSError` behind `error` that is the host's, and the one that any use of files meets now."""
    if error is not None and (fault := wrapped_os_error(error)) is not None:
        raise fault from None
    # Without files a resolver says that there is no such host, TLS that nobody vouches for it, boto3 that there are
    # no credentials.
    for end in socket.socketpair():
        end.close()
