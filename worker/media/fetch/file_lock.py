"""Files by which threads and processes of a host take turns. A lock ends with its holder, however that ends."""

import errno
import fcntl
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from keye.worker.media.fetch.lack import is_lack
from keye.worker.private_folder import is_own_file

# How often who waits for another is asked whether to go on.
_TICK_SECONDS = 0.1


@contextmanager
def locked(path: Path) -> Iterator[int]:
    """A handle as of `open_file`, locked. Who waited may find the path gone or another's (`is_at`)."""
    handle = open_file(path)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle
    finally:
        close_unlocked(handle)


def open_file(path: Path) -> int:
    """A handle of `path`, made where it is missing; what is no file of ours makes way for one."""
    with suppress(_NotAFile):
        return _open_if_file(path)
    remove(path)
    return _open_if_file(path)


def lock(handle: int, check: Callable[[], None]) -> None:
    """The wait may be long: it ends by what `check` raises."""
    while not try_lock(handle):
        check()
        time.sleep(_TICK_SECONDS)


def try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def unlock(handle: int) -> None:
    fcntl.flock(handle, fcntl.LOCK_UN)


def close_unlocked(handle: int) -> None:
    # Closing alone would leave the lock to a child that was forked meanwhile.
    unlock(handle)
    os.close(handle)


def is_at(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(path.lstat(), os.fstat(handle))
    except (FileNotFoundError, NotADirectoryError):
        return False


def measure_held(path: Path) -> tuple[int, int]:
    """How many bytes a file has that is locked, and how many one had whose holder is dead, which is removed."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as fault:
        if is_lack(fault):
            raise
        return 0, 0
    try:
        found = os.fstat(handle)
        if not is_own_file(found):
            return 0, 0
        if not try_lock(handle):
            return found.st_size, 0
        if is_at(path, handle):
            path.unlink(missing_ok=True)
        return 0, found.st_size
    finally:
        close_unlocked(handle)


def make_private(folder: Path) -> None:
    """In a folder that is this user's alone. What is in the way, or was made by another while that was open, goes."""
    try:
        os.mkdir(folder, 0o700)
    except FileExistsError:
        found = os.lstat(folder)
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid():
            if found.st_mode & 0o077:
                os.chmod(folder, 0o700)
        else:
            remove(folder)
            os.mkdir(folder, 0o700)


def remove(path: Path) -> None:
    """Whatever lies there, if that can be."""
    try:
        path.unlink()
    except (IsADirectoryError, PermissionError):
        shutil.rmtree(path, ignore_errors=True)
    except OSError:
        return


class _NotAFile(OSError):
    pass


def _open_if_file(path: Path) -> int:
    try:
        # A link may lead out of the folder, and a pipe would be waited for.
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    except OSError as fault:
        # A folder, a link, a socket, another user's file.
        if fault.errno in (errno.EISDIR, errno.ELOOP, errno.ENXIO, errno.EACCES):
            raise _NotAFile(fault.errno, fault.strerror, str(path)) from None
        raise
    if not is_own_file(os.fstat(handle)):
        os.close(handle)
        raise _NotAFile(errno.ENXIO, "is no file of ours", str(path))
    return handle
