"""Folders that a worker keeps for itself on a host that it shares with other users: where they lie, made and opened.

What is in them is for who keeps it. The standard library only: a probe has no time for more.
"""

import errno
import logging
import os
import stat
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from keye.config.ownership import is_trusted, others_may_write

log = logging.getLogger(__name__)

# As many as the kernel follows.
_MAX_LINKS = 40
_MAX_TRIES = 100


class _Step(NamedTuple):
    """Of a walk: an O_PATH descriptor, where it leads without links, and what is there."""

    handle: int
    path: Path
    found: os.stat_result


class PrivateFolder:
    """A folder that this user alone can write to, wherever `path` lies.

    It is `path` itself where that is ours and closed to others, or is not there and can be made; and `keye-<uid>` in
    it where it is root's, such as a volume of Kubernetes, or open to others. On the way each folder and each link must
    be ours or root's: anybody else could lead us elsewhere. Where others may write to a folder on the way that is not
    sticky they can move ours away, and no more: what they put in its place is not ours, and is refused.
    """

    def __init__(self, path: Path, setting: str) -> None:
        """`setting` names it to who may choose another."""
        self.path = path.absolute()
        self._setting = setting
        self._is_within = False
        self._is_told = False
        self._is_moved = False
        self._held = -1
        self._holding = Lock()

    @property
    def place(self) -> Path:
        """Where it was when it was last opened or looked for."""
        return self.path / _own_name() if self._is_within else self.path

    def open(self, *, make: bool) -> int:
        """A descriptor of the folder, for acts relative to it.

        Raises `PermissionError` where it would not be this user's alone, another `OSError` where it cannot be had.
        """
        risks: list[str] = []
        step = self._walk(make, risks)
        try:
            handle = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=step.handle)
        finally:
            os.close(step.handle)
        if risks and not self._is_told:
            self._is_told = True
            log.warning("%s", risks[0])
        return handle

    def examine(self) -> str:
        """What others could do to it, and the cure; "" for nothing.

        It may be that it is not there yet, and is not made; else raises as `open`.
        """
        risks: list[str] = []
        with suppress(FileNotFoundError):
            os.close(self._walk(False, risks).handle)
        return risks[0] if risks else ""

    def hold(self) -> Path:
        """A path that leads to the folder by a descriptor, the same one at each call: names above it count no more.

        The folder is made again where it was deleted or moved. Raises as `open`; where it was moved and another cannot
        be had, it is used where it is.
        """
        with self._holding:
            if self._held < 0:
                self._held = self.open(make=True)
                weakref.finalize(self, os.close, self._held)
            elif not self._is_there():
                self._hold_anew()
            return Path(f"/proc/self/fd/{self._held}")

    def _hold_anew(self) -> None:
        try:
            handle = self.open(make=True)
        except OSError as fault:
            is_deleted = os.fstat(self._held).st_nlink == 0
            if is_deleted:
                raise
            if not self._is_moved:
                log.warning("%s was moved away, and is used where it is: %s", self.place, fault)
            self._is_moved = True
            return
        self._is_moved = False
        # In one step: other threads are at work by this number.
        os.dup2(handle, self._held, inheritable=False)
        os.close(handle)

    @contextmanager
    def named(self) -> Iterator[None]:
        """Faults within what is held name it as its setting does, not by a number."""
        try:
            yield
        except OSError as fault:
            if fault.filename is not None:
                held = f"/proc/self/fd/{self._held}"
                fault.filename = os.fsdecode(fault.filename).replace(held, str(self.place), 1)
            raise

    def _is_there(self) -> bool:
        with suppress(FileNotFoundError, NotADirectoryError):
            return os.path.samestat(os.stat(self.place), os.fstat(self._held))
        return False

    def _walk(self, make: bool, risks: list[str]) -> _Step:
        here, is_within = _begin(), False
        waiting, num_links = [*reversed(self.path.parts[1:])], 0
        try:
            while waiting or not self._is_ours_alone(here, is_within):
                if not waiting:
                    is_within = True
                    waiting.append(_own_name())
                name = waiting.pop()
                following = _enter(here, name, 0o755 if waiting else 0o700, make)
                try:
                    if stat.S_ISLNK(following.found.st_mode):
                        num_links += 1
                        target = self._target(here, following, num_links)
                        waiting += reversed(target.parts[target.is_absolute() :])
                        turn = _begin() if target.is_absolute() else here._replace(handle=os.dup(here.handle))
                        os.close(following.handle)
                        following = turn
                    else:
                        self._check(following, here, risks)
                except BaseException:
                    os.close(following.handle)
                    raise
                os.close(here.handle)
                here = following
        except BaseException:
            os.close(here.handle)
            raise
        finally:
            self._is_within = is_within
        return here

    def _is_ours_alone(self, end: _Step, is_within: bool) -> bool:
        is_so = end.found.st_uid == os.geteuid() and not others_may_write(end.found)
        if is_within and not is_so:
            raise self._refusal(f"{end.path} is not this user's alone (uid {end.found.st_uid}, mode {_mode(end)})")
        return is_so

    def _check(self, step: _Step, above: _Step, risks: list[str]) -> None:
        if not stat.S_ISDIR(step.found.st_mode):
            raise FileExistsError(errno.EEXIST, "is no folder", str(step.path))
        if not is_trusted(step.found.st_uid):
            raise self._refusal(f"{step.path} belongs to another user (uid {step.found.st_uid})")
        is_open = others_may_write(step.found) and not step.found.st_mode & stat.S_ISVTX
        # A volume of a container is made so, and nobody else is there.
        if is_open and step.found.st_dev == above.found.st_dev:
            risks.append(
                f"{step.path} may be written by others (mode {_mode(step)}), who can move away what is kept below it. "
                f"Take that from them (chmod go-w, or chmod +t), or set {self._setting} to another folder."
            )

    def _target(self, here: _Step, link: _Step, num_links: int) -> Path:
        if not is_trusted(link.found.st_uid):
            raise self._refusal(f"{link.path} is a link of another user's (uid {link.found.st_uid})")
        if others_may_write(here.found) and not here.found.st_mode & stat.S_ISVTX:
            # One of ours may have been moved there.
            raise self._refusal(f"{link.path} is a link in a folder that others may write (mode {_mode(here)})")
        if num_links > _MAX_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(link.path))
        return Path(os.readlink("", dir_fd=link.handle))

    def _refusal(self, found: str) -> PermissionError:
        return PermissionError(f"{found}. Set {self._setting} to a folder that this user owns or can make.")


def is_own_file(found: os.stat_result) -> bool:
    """A file of this user's by one name only: another's could change meanwhile, and a second name leads elsewhere."""
    return stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and found.st_nlink <= 1


def _own_name() -> str:
    return f"keye-{os.geteuid()}"


def _mode(step: _Step) -> str:
    return f"{stat.S_IMODE(step.found.st_mode):o}"


def _begin() -> _Step:
    handle = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    return _Step(handle, Path("/"), os.fstat(handle))


def _enter(here: _Step, name: str, mode: int, make: bool) -> _Step:
    """What is there by that name, made where nothing is."""
    path = Path(os.path.normpath(here.path / name))
    try:
        for _ in range(_MAX_TRIES):
            try:
                handle = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=here.handle)
                return _Step(handle, path, os.fstat(handle))
            except FileNotFoundError:
                if not make:
                    raise
            # Somebody may be making it, or deleting it, just now.
            with suppress(FileExistsError):
                os.mkdir(name, mode, dir_fd=here.handle)
        raise FileNotFoundError(errno.ENOENT, "is deleted again and again")
    except OSError as fault:
        fault.filename = str(path)
        raise
