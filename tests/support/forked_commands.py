"""Commands as processes of their own, forked from one that has imported what they need: dozens of them in a second."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, below zero for a signal, what it said, and after how long."""

    code: int
    out: str
    err: str
    seconds: float


class Forked:
    """Commands that run; `pids` are theirs, in their order."""

    def __init__(self, parent: subprocess.Popen[str], folder: Path) -> None:
        self._parent = parent
        self._folder = folder
        assert parent.stdout is not None
        self.pids: list[int] = json.loads(parent.stdout.readline())

    def ended(self) -> list[Ended]:
        assert self._parent.stdout is not None
        return [
            Ended(code, self._said(number, "out"), self._said(number, "err"), seconds)
            for number, (code, seconds) in enumerate(json.loads(self._parent.stdout.readline()))
        ]

    def _said(self, number: int, name: str) -> str:
        path = self._folder / f"{number}.{name}"
        return path.read_text() if path.exists() else ""


@contextmanager
def forked(
    commands: Sequence[Sequence[str]],
    environ: Mapping[str, str],
    folder: Path,
    out: int | str | None = None,
    err: int | str | None = None,
) -> Iterator[Forked]:
    """All of them at once. What they say goes to `out` and `err` where these are given: a descriptor or a file."""
    folder.mkdir(exist_ok=True)
    asked = {"commands": commands, "folder": str(folder), "streams": [out, err]}
    inherited = [stream for stream in (out, err) if isinstance(stream, int)]
    command = [sys.executable, "-m", "tests.support.forked_commands", json.dumps(asked)]
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True, pass_fds=inherited) as parent:
        yield Forked(parent, folder)


def main() -> None:

    from keye.__main__ import main as keye
    from keye.worker.daemon.entry import main as keye_worker

    asked = json.loads(sys.argv[1])
    began = {}
    for number, command in enumerate(asked["commands"]):
        pid = os.fork()
        if pid == 0:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for descriptor, (name, given) in enumerate(zip(("out", "err"), asked["streams"], strict=True), 1):
                path = f"{asked['folder']}/{number}.{name}" if given is None else given
                opened = path if isinstance(path, int) else os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
                os.dup2(opened, descriptor)
            # Those of the parent know what they were opened on.
            sys.stdout, sys.stderr = (open(descriptor, "w", closefd=False) for descriptor in (1, 2))  # noqa: SIM115
            sys.argv = list(command)
            {"keye": keye, "keye-worker": keye_worker}[command[0]]()
            sys.exit()
        began[pid] = time.monotonic()
    print(json.dumps(list(began)), flush=True)
    ended = {}
    while len(ended) < len(began):
        pid, status = os.wait()
        ended[pid] = os.waitstatus_to_exitcode(status), time.monotonic() - began[pid]
    print(json.dumps([ended[pid] for pid in began]), flush=True)


if __name__ == "__main__":
    main()
