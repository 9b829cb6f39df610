"""Media that are here already: files below the media roots, opened where they lie, and what is inside the job."""

import binascii
import errno
import os
import stat
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from keye.config.job import MAX_INLINE_BYTES
from keye.worker.media.faults import corrupt, forbidden, not_found
from keye.worker.media.limits import check_size

# What a path may be refused for. All else is the worker's host: no more files, a disk that fails or has gone.
_OF_THE_PATH = (errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ)


def open_local(uri: str, roots: Sequence[Path], max_bytes: int) -> BinaryIO:
    """Open a regular file below one of `roots`, wherever symbolic links on the way lead (Linux only: needs /proc).

    `uri` is an absolute path or a `file:` URI (RFC 8089: percent-encoded, on this host). No moment is left between the
    check and the use.

    A hard link leaves no trace of where the file's other names lie, only how many it has. So a file of more than one
    name is refused: one of them may be outside.
    """
    path = path_of(uri)
    if not roots:
        raise forbidden("this worker reads no local files. Set KEYE_MEDIA_ROOTS.")
    if ".." in path.split("/"):
        raise forbidden("holds '..'. Write the path without it.")
    resolved_roots = [os.path.realpath(root) for root in roots]
    try:
        # Told before anything is opened, so that nobody learns which files exist outside the roots.
        _check_inside(os.path.realpath(path), resolved_roots)
        # O_PATH names the file without opening it: a FIFO does not block, a device does not act.
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        raise not_found("there is no such file on this worker.") from None
    except OSError as error:
        if error.errno not in _OF_THE_PATH:
            raise
        raise forbidden(f"{error.strerror}.") from None
    try:
        itself = f"/proc/self/fd/{handle}"
        # The path may lead elsewhere by now; what the handle holds can no longer change.
        _check_inside(os.readlink(itself), resolved_roots)
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise forbidden("is no regular file, and only those are read.")
        if found.st_nlink > 1:
            raise forbidden(f"has {found.st_nlink} names (hard links), and others may lie outside. Copy the file.")
        check_size(found.st_size, max_bytes)
        return open(itself, "rb")
    except PermissionError:
        raise forbidden("the worker may not read it. Change its permissions.") from None
    finally:
        os.close(handle)


def path_of(uri: str) -> str:
    """Raises the `MediumFault` of a URI that names no file of this host."""
    if uri.startswith("/"):
        return uri
    try:
        url = urlsplit(uri)
        is_of_this_host = url.netloc in ("", "localhost") and url.path.startswith("/")
    except ValueError:  # file://[/name, or a host that is another once it is normalised
        is_of_this_host = False
    if not is_of_this_host:
        raise not_found("is no file URI of this host. Write file:///folder/name.")
    return unquote(url.path)


def _check_inside(real_path: str, resolved_roots: Sequence[str]) -> None:
    if not any(os.path.commonpath((root, real_path)) == root for root in resolved_roots):
        raise forbidden("lies outside the folders that are read (KEYE_MEDIA_ROOTS).")


def open_inline(uri: str, max_bytes: int) -> BinaryIO:
    """The bytes of a `data:` URI (RFC 2397), which are few."""
    head, comma, payload = uri.partition(",")
    if not comma:
        raise corrupt("has no comma between its type and its bytes.")
    try:
        content = unquote_to_bytes(payload)
        if head.lower().endswith(";base64"):
            content = binascii.a2b_base64(content, strict_mode=True)
    except (binascii.Error, UnicodeEncodeError):
        raise corrupt("its bytes are not valid base64.") from None
    check_size(len(content), min(max_bytes, MAX_INLINE_BYTES))
    with ExitStack() as opened:
        file = opened.enter_context(os.fdopen(os.memfd_create("keye-inline", os.MFD_CLOEXEC), "w+b"))
        file.write(content)
        file.seek(0)
        opened.pop_all()
    return file
