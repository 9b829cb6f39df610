"""Which `.env` settings come from: the working directory's, unless somebody else may have written it.

Its text is for who reads it.
"""

import logging
import os
import stat
import sys
from contextlib import suppress

from keye.config.ownership import is_trusted, others_may_write

log = logging.getLogger(__name__)

_NAME = ".env"
_told: set[str] = set()


def env_file() -> str | None:
    """The name of the file, or None where there is none to read.

    One that another user has written, or may have put where it lies, is passed over with a warning: were it refused,
    a stranger could stop whoever works in /tmp. One that is ours, and that others may write to, raises
    `PermissionError`: to go on by half of one's own settings is worse than not to start. Raises `OSError` where it
    cannot be looked at.
    """
    with suppress(FileNotFoundError):
        entry = os.lstat(_NAME)
        # A folder of that name is somebody's virtual environment.
        if stat.S_ISDIR(entry.st_mode):
            return None
        if sys.platform == "win32":
            return _NAME
        # Before it is followed: the kernel may forbid that, and a link may lead to itself.
        reason = _reason_against(entry, os.stat("."))
        found = entry if reason else os.stat(_NAME)
        if reason := reason or _reason_of(found):
            _tell(reason)
            return None
        # Not a device, such as /dev/null.
        if not (stat.S_ISREG(found.st_mode) or stat.S_ISFIFO(found.st_mode)):
            return None
        if others_may_write(found):
            mode = stat.S_IMODE(found.st_mode)
            raise PermissionError(f"others may write to it (mode {mode:o}). Take that from them: chmod go-w {_NAME}")
        return _NAME
    return None


def _tell(reason: str) -> None:
    where = os.getcwd()
    if where not in _told:
        _told.add(where)
        log.warning("%s in %s is not read: %s. Have your own in a folder of your own.", _NAME, where, reason)


def _reason_against(entry: os.stat_result, folder: os.stat_result) -> str:
    if reason := _reason_of(entry):
        return reason
    if not is_trusted(folder.st_uid):
        return f"the folder belongs to another user (uid {folder.st_uid})"
    if folder.st_mode & stat.S_IWOTH and not folder.st_mode & stat.S_ISVTX:
        return f"all may write to the folder (mode {stat.S_IMODE(folder.st_mode):o})"
    return ""


def _reason_of(found: os.stat_result) -> str:
    return "" if is_trusted(found.st_uid) else f"it belongs to another user (uid {found.st_uid})"
