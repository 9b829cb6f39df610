"""Whose a file or folder of this host is, and who else may write to it. The standard library only; not for Windows."""

import os
import sys
from stat import S_IWGRP, S_IWOTH

if sys.platform != "win32":
    import grp
    import pwd


def is_trusted(uid: int) -> bool:
    """Ours, or root's. Who owns the root of all is as good as root: in a user namespace that may be `nobody`."""
    return uid in (os.geteuid(), 0) or uid == os.stat("/").st_uid


def others_may_write(found: os.stat_result) -> bool:
    """Others than its owner and root, by its mode; a list of access rights is no wider than that."""
    return bool(found.st_mode & S_IWOTH or (found.st_mode & S_IWGRP and not _is_own_group(found.st_gid)))


def _is_own_group(gid: int) -> bool:
    """Where each user has a group of the same name, files are often its to write."""
    if gid != os.getegid():
        return False
    try:
        user, group = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(gid)
    except KeyError:
        return False
    return group.gr_name == user and {*group.gr_mem} <= {user}
