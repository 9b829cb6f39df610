"""Which local files may be read. Opens them in a way that leaves no moment between the check and the use."""

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from keye.config.outcome import ErrorCode
from keye.worker.media.fault import MediaFault


def open_inside(path: str, roots: Sequence[Path], name: str) -> BinaryIO:
    """Open a regular file below one of `roots`, wherever symbolic links on the way lead (Linux only: needs /proc).

    A hard link leaves no trace of where the file's other names lie, only how many it has. So a file of more than one
    name is refused: one of them may be outside.
    """
    if not roots:
        raise MediaFault(
            ErrorCode.MEDIA_FORBIDDEN,
            f"{name}: local files are off on this worker. Set KEYE_MEDIA_ROOTS to allow them.",
        )
    if ".." in path.split("/"):
        raise MediaFault(ErrorCode.MEDIA_FORBIDDEN, f"{name}: holds '..'. Write the path without it.")
    resolved_roots = [os.path.realpath(root) for root in roots]
    try:
        # Told before anything is opened, so that nobody learns which files exist outside the roots.
        _check_inside(os.path.realpath(path), resolved_roots, name)
        # O_PATH names the file without opening it: a FIFO does not block, a device does not act.
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        raise MediaFault(ErrorCode.MEDIA_NOT_FOUND, f"{name}: there is no such file on this worker.") from None
    except OSError as error:
        raise MediaFault(ErrorCode.MEDIA_FORBIDDEN, f"{name}: {error.strerror}.") from None
    try:
        itself = f"/proc/self/fd/{handle}"
        # The path may lead elsewhere by now; what the handle holds can no longer change.
        _check_inside(os.readlink(itself), resolved_roots, name)
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise MediaFault(ErrorCode.MEDIA_FORBIDDEN, f"{name}: is no regular file, and only those are read.")
        if found.st_nlink > 1:
            raise MediaFault(
                ErrorCode.MEDIA_FORBIDDEN,
                f"{name}: has {found.st_nlink} names (hard links), and others may lie outside. Copy the file.",
            )
        return open(itself, "rb")
    except PermissionError:
        raise MediaFault(
            ErrorCode.MEDIA_FORBIDDEN, f"{name}: the worker's user may not read it. Change the file's permissions."
        ) from None
    finally:
        os.close(handle)


def _check_inside(real_path: str, resolved_roots: Sequence[str], name: str) -> None:
    if not any(os.path.commonpath((root, real_path)) == root for root in resolved_roots):
        raise MediaFault(
            ErrorCode.MEDIA_FORBIDDEN, f"{name}: lies outside the folders this worker may read (KEYE_MEDIA_ROOTS)."
        )
