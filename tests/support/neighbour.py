"""Another user of the host, for real: what they can do in a folder that all may write to, such as /var/tmp."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

UID = 4321

needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("setpriv"), reason="only root can be another user, by Debian's setpriv"
)


def does(script: str, *arguments: Path | str) -> None:
    """A shell's script, done by the neighbour. Raises where they may not."""
    command = ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups", "sh", "-ec", f"umask 0; {script}", "-"]
    subprocess.run([*command, *map(str, arguments)], check=True, capture_output=True, cwd="/")


def python_as(uid: int, imports: str, code: str, *arguments: Path | str) -> str:
    """What the code prints that a user without any rights runs, for whom modules are imported before."""
    ids = f"({uid}, {uid}, {uid})"
    turn = f"import os, sys\n{imports}\nos.setgroups([]); os.setresgid{ids}; os.setresuid{ids}"
    done = subprocess.run(
        [sys.executable, "-c", f"{turn}\n{code}", *map(str, arguments)], capture_output=True, text=True, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def shared_folder() -> Iterator[Path]:
    """As /var/tmp is: all may write, and what is there stays whose it is."""
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="keye-test-") as folder:
        os.chmod(folder, 0o1777)
        yield Path(folder)
