"""The folders that local media are read from, and whether each still is what it was when the worker started. Opens no
file: that is `fetch.local`.
"""

import os
import re
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from keye.worker.host_fault import HostFault
from keye.worker.media.place import place_of


class MediaRoots:
    """What lies at each path is noted when this is made: where it is unmounted later, no job is to blame for it."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        self._roots = [_Root(path) for path in paths]
        below = [Path(os.path.realpath(path)) for path in paths]
        mounts = _mount_points() if below else []
        self._mounts = [mount for mount in mounts if any(root in mount.parents for root in below)]

    def check(self) -> None:
        """Raises `HostFault` where a root is away or is another folder than at first; takes microseconds."""
        for root in self._roots:
            root.check()

    def check_way(self, path: str) -> None:
        """As `check`, and of what was mounted below a root, on the way to a file that is not to be had."""
        self.check()
        place = Path(place_of(path))
        on_the_way = [mount for mount in self._mounts if mount == place or mount in place.parents]
        # By what the kernel lists, here as at first: to look at a mount that hangs would hold up the worker's start.
        if away := set(on_the_way).difference(_mount_points() if on_the_way else ()):
            raise HostFault(
                f"{min(away)}, below a media root, was mounted at start and is not. "
                "Mount it again, or restart the worker if that is meant."
            )


class _Root:
    """One that was not there at first is noted when it comes.

    A file system gets another device number with each mount, and its folders keep their inodes. So the same inode on
    another device is the folder again, unless that device is the one that shows while the file system is away.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._is_noted = False
        self._device_while_away: int | None = None
        # Whatever is wrong with it, `check` tells of it.
        with suppress(OSError):
            found = os.stat(path)
            if stat.S_ISDIR(found.st_mode):
                self._note(found)

    def check(self) -> None:
        try:
            found = os.stat(self._path)
        except OSError as error:
            cure = "Mount it again, or take it out of KEYE_MEDIA_ROOTS."
            raise HostFault(f"The media root {self._path} cannot be reached: {error.strerror}. {cure}") from None
        if not stat.S_ISDIR(found.st_mode) or not os.access(self._path, os.X_OK):
            raise HostFault(f"The media root {self._path} is no folder that can be read. Change its permissions.")
        # Where a link is the root, whoever points it elsewhere means it.
        if not self._is_noted or (self._is_link and os.path.realpath(self._path) != self._leads_to):
            self._note(found)
        is_inode = self._inode in (None, found.st_ino)
        if is_inode and found.st_dev != self._device_while_away:
            self._device = found.st_dev
        if not is_inode or found.st_dev != self._device:
            self._device_while_away = found.st_dev
            raise HostFault(
                f"The media root {self._path} is another folder than at start, it was unmounted or replaced. "
                "Mount it again, or restart the worker if that is meant."
            )

    def _note(self, found: os.stat_result) -> None:
        self._leads_to = os.path.realpath(self._path)
        self._is_link = self._leads_to != os.path.abspath(self._path)
        self._inode = None if _renumbers(found.st_dev) else found.st_ino
        self._device = found.st_dev
        above = (os.stat(folder).st_dev for folder in Path(self._leads_to).parents)
        self._device_while_away = next((device for device in above if device != found.st_dev), None)
        self._is_noted = True


def _renumbers(device: int) -> bool:
    """Whether inodes of this device get other numbers while it is mounted, as those of many FUSE file systems do."""
    number = f"{os.major(device)}:{os.minor(device)}"
    return any(mount[2] == number and mount[mount.index("-") + 1].startswith("fuse") for mount in _mounts())


def _mount_points() -> list[Path]:
    # Spaces and the like are written in octal.
    return [Path(re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), mount[4])) for mount in _mounts()]


def _mounts() -> list[list[str]]:
    """Fields as of proc(5), of /proc/self/mountinfo."""
    text = Path("/proc/self/mountinfo").read_bytes().decode(errors="surrogateescape")
    return [line.split(" ") for line in text.splitlines()]
