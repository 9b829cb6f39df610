"""Media that are here already: files below the media roots, opened where they lie, and what is inside the job."""

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote_to_bytes, urlsplit

from keye.config.faults import Fault
from keye.config.formats import read_inline
from keye.config.job import MAX_INLINE_BYTES, MAX_URI_BYTES
from keye.worker.media.faults import corrupt, forbidden, not_found
from keye.worker.media.limits import check_size
from keye.worker.media.place import place_of

# What a path may be refused for. All else is the worker's host: no more files, a disk that fails or has gone.
_OF_THE_PATH = (errno.EACCES, errno.EPERM, errno.ELOOP, errno.EINVAL, errno.EILSEQ)
# What the kernel puts behind the path of a file that has been unlinked since it was opened.
_DELETED = " (deleted)"
# Longer than any may be.
_NO_NAME = "x" * 300


def open_local(uri: str, roots: Sequence[Path], max_bytes: int) -> BinaryIO:
    """Open a regular file below one of `roots`, wherever symbolic links on the way lead (Linux only: needs /proc).

    `uri` is an absolute path or a `file:` URI (RFC 8089: percent-encoded, on this host).

    Whoever may write below a root may swap links, names and folders at any moment. So the way is gone by the kernel, to
    a handle that stands for one file from then on, and what is judged is that file. A hard link leaves no trace of
    where a file's other names lie, only how many there are: a file of more than one is refused. They are counted before
    it is asked where the name lies by which it was opened. That name, once unlinked, never comes back; so if it is
    there at the end it was there while they were counted, and was the only one.

    What this cannot see: a file that somebody may move out of its own folder, and has moved below a root, lies there. A
    root that lies below another is whatever those who may write there make of it. A network's file system may tell late
    of what other hosts do.
    """
    if len(uri) > MAX_URI_BYTES:
        raise not_found(f"is a path of {len(uri)} characters, the limit is {MAX_URI_BYTES}. No file has so long a one.")
    path = path_of(uri)
    if not roots:
        raise forbidden("this worker reads no local files. Set KEYE_MEDIA_ROOTS.")
    if ".." in path.split("/"):
        raise forbidden("holds '..'. Write the path without it.")
    resolved_roots = [os.path.realpath(root) for root in roots]
    try:
        with _named(path) as handle:
            place = _place(handle)
        _check_inside(place, resolved_roots)
        folder_path, _, name = place.rpartition("/")
        with _named(folder_path or "/") as folder, _named(f"/proc/self/fd/{folder}/{name}", os.O_NOFOLLOW) as handle:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode):
                raise forbidden("is no regular file, and only those are read.")
            if found.st_nlink > 1:
                raise forbidden(f"has {found.st_nlink} names (hard links), and others may lie outside. Copy the file.")
            _wait_for_changes_of(folder)
            place = _place(handle)
            _check_inside(place, resolved_roots)
            if place.endswith(_DELETED) or place != f"{_place(folder).rstrip('/')}/{name}":
                raise not_found(f"was moved or deleted just now, or its name ends in '{_DELETED}'. Rename it then.")
            check_size(found.st_size, max_bytes)
            return _open_to_read(handle)
    except ValueError:  # no path at all, such as one with a zero in it
        raise not_found("there is no such file on this worker.") from None
    except OSError as error:
        # The same for all that lies outside: nobody learns which files exist there.
        _check_inside(place_of(path), resolved_roots)
        raise _of_the_path(error) or error from None


@contextmanager
def _named(path: str, flags: int = 0) -> Iterator[int]:
    """O_PATH names what is there without opening it: a FIFO does not block, a device does not act."""
    handle = os.open(path, os.O_PATH | os.O_CLOEXEC | flags)
    try:
        yield handle
    finally:
        os.close(handle)


def _place(handle: int) -> str:
    return os.readlink(f"/proc/self/fd/{handle}")


def _wait_for_changes_of(folder: int) -> None:
    """Returns when who was about to change the folder has done so.

    The kernel counts a name that is unlinked off before it takes it away, both while it holds the folder for itself;
    and who looks for a name that it has not seen has to wait for that. Such a long one no file system asks its disk or
    its server for, nor keeps in mind.
    """
    with suppress(OSError):
        os.lstat(f"/proc/self/fd/{folder}/{_NO_NAME}")


def _open_to_read(handle: int) -> BinaryIO:
    try:
        return open(f"/proc/self/fd/{handle}", "rb")
    except PermissionError:
        raise forbidden("the worker may not read it. Change its permissions.") from None


def _of_the_path(error: OSError) -> Fault | None:
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR:
            return not_found("there is no such file on this worker.")
        case errno.ENAMETOOLONG:
            return not_found("there is no such file: the path, or a name in it, is longer than any may be (255 bytes).")
        case number if number in _OF_THE_PATH:
            return forbidden(f"{error.strerror}.")
    return None


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
    return os.fsdecode(unquote_to_bytes(url.path))


def _check_inside(real_path: str, resolved_roots: Sequence[str]) -> None:
    if not any(os.path.commonpath((root, real_path)) == root for root in resolved_roots):
        raise forbidden("lies outside the folders that are read (KEYE_MEDIA_ROOTS).")


def open_inline(uri: str, max_bytes: int) -> BinaryIO:
    """The bytes of a `data:` URI, which are few."""
    try:
        content = read_inline(uri)
    except ValueError as error:
        raise corrupt(str(error)) from None
    check_size(len(content), min(max_bytes, MAX_INLINE_BYTES))
    with ExitStack() as opened:
        file = opened.enter_context(os.fdopen(os.memfd_create("keye-inline", os.MFD_CLOEXEC), "w+b"))
        file.write(content)
        file.seek(0)
        opened.pop_all()
    return file
