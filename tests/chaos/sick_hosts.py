"""The seven ways in which the host of a worker falls sick, each with its cure."""

import os
import resource
import shutil
import signal
import subprocess
from abc import ABC, abstractmethod
from contextlib import ExitStack
from pathlib import Path
from typing import ClassVar

from tests.chaos.echo_workers import EchoWorker
from tests.support.mounts import mounted

# No user of this machine; limits on processes do not hold for root.
SOMEBODY = 4321

# Run by each interpreter that finds it on its path: a decoder child ends before it begins.
UNSTARTABLE = """
import os, sys
if "keye.worker.media.decode.child" in sys.orig_argv and os.path.exists({flag!r}):
    sys.exit("a library is missing")
"""


class SickHost(ABC):
    """The worker that is to fall sick has `settings` and is run `within` a command. `restarts`: the process ends."""

    within: ClassVar[tuple[str, ...]] = ()
    restarts: ClassVar[bool] = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mounts = ExitStack()
        self.root = folder / "media"
        self.root.mkdir()
        self.cache = folder / "cache"
        self.settings = {"KEYE_CACHE_FOLDER": str(self.cache), "KEYE_MEDIA_ROOTS": str(self.root)}

    @abstractmethod
    def sicken(self, worker: EchoWorker) -> None: ...

    @abstractmethod
    def cure(self, worker: EchoWorker) -> None: ...

    def leave(self) -> None:
        """Nothing of it stays behind."""
        self.mounts.close()


class FullDisk(SickHost):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.mounts.enter_context(mounted(self.cache, 2**24))

    def sicken(self, worker: EchoWorker) -> None:
        # It has none of its own to give up, which would do for a while.
        for kept in self.cache.glob("whole/*"):
            kept.unlink()
        with (self.cache / "filler").open("wb", buffering=0) as filler:
            try:
                while filler.write(bytes(4096)):
                    pass
            except OSError:
                pass

    def cure(self, worker: EchoWorker) -> None:
        (self.cache / "filler").unlink()


class NoFiles(SickHost):
    """What is open stays open."""

    def sicken(self, worker: EchoWorker) -> None:
        _, self._hard = resource.prlimit(worker.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(worker.pid, resource.RLIMIT_NOFILE, (8, self._hard))

    def cure(self, worker: EchoWorker) -> None:
        resource.prlimit(worker.pid, resource.RLIMIT_NOFILE, (self._hard, self._hard))


class NoProcesses(SickHost):
    """The limit counts a user's threads, too."""

    # Who may read what root may, since an interpreter often lies in a home.
    within = (
        *("setpriv", f"--reuid={SOMEBODY}", f"--regid={SOMEBODY}", "--clear-groups"),
        *("--inh-caps=+dac_override", "--ambient-caps=+dac_override"),
    )

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        os.chown(folder, SOMEBODY, SOMEBODY)
        os.chown(self.root, SOMEBODY, SOMEBODY)
        self.settings |= {"KEYE_SPOOL_FOLDER": str(folder / "spool"), "HOME": str(folder)}

    def sicken(self, worker: EchoWorker) -> None:
        self._limit(worker, "1:")

    def cure(self, worker: EchoWorker) -> None:
        self._limit(worker, "10000:")

    def _limit(self, worker: EchoWorker, soft: str) -> None:
        # By its own user: root in a container may not.
        subprocess.run([*self.within, "prlimit", f"--pid={worker.pid}", f"--nproc={soft}"], check=True)


class CacheGone(SickHost):
    """A file is in its place, so that it cannot be made again."""

    def sicken(self, worker: EchoWorker) -> None:
        shutil.rmtree(self.cache)
        self.cache.touch()

    def cure(self, worker: EchoWorker) -> None:
        self.cache.unlink()


class RootUnmounted(SickHost):
    """Where this worker looks alone."""

    within = ("unshare", "--mount", "--propagation", "private")

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._lent = folder / "lent"
        self.mounts.enter_context(mounted(self._lent))
        subprocess.run(["mount", "--bind", self._lent, self.root], check=True)
        self.mounts.callback(subprocess.run, ["umount", "-l", self.root], check=True)

    def sicken(self, worker: EchoWorker) -> None:
        subprocess.run(["nsenter", f"--mount=/proc/{worker.pid}/ns/mnt", "umount", "-l", self.root], check=True)

    def cure(self, worker: EchoWorker) -> None:
        bind = ["mount", "--bind", self._lent, self.root]
        subprocess.run(["nsenter", f"--mount=/proc/{worker.pid}/ns/mnt", *bind], check=True)


class DeviceLost(SickHost):
    restarts = True

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._flag = folder / "lost"
        self.settings |= {"ECHO_DEVICE_LOST": str(self._flag)}

    def sicken(self, worker: EchoWorker) -> None:
        self._flag.touch()

    def cure(self, worker: EchoWorker) -> None:
        self._flag.unlink()


class NoDecoders(SickHost):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._flag = folder / "missing"
        (folder / "sitecustomize.py").write_text(UNSTARTABLE.format(flag=str(self._flag)))
        self.settings |= {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}

    def sicken(self, worker: EchoWorker) -> None:
        self._flag.touch()
        for children in Path(f"/proc/{worker.pid}/task").glob("*/children"):
            for pid in children.read_text().split():
                os.kill(int(pid), signal.SIGKILL)

    def cure(self, worker: EchoWorker) -> None:
        self._flag.unlink()


WAYS = (FullDisk, NoFiles, NoProcesses, CacheGone, RootUnmounted, DeviceLost, NoDecoders)
