"""The release before this one: what a fleet that is being upgraded, or a producer of last month, still runs."""

import shutil
import subprocess
from pathlib import Path

from tests.support.checkout import ROOT
from tests.support.wheel import install_wheel

# The tag and the commit it stands on: a clone may come without tags.
TAG = "v0.2.0"
COMMIT = "37868c81cdf6aef780d2600f8bcb225e25484928"


def unpack_release(folder: Path) -> Path:
    """Install the wheel of the release, built from its source in git, into a folder for PYTHONPATH.

    Raises `LookupError` where the clone does not reach back to it.
    """
    source = folder / "source"
    archive = ["git", "archive", "--format=tar", f"--output={source}.tar", COMMIT]
    kept = subprocess.run(archive, cwd=ROOT, capture_output=True, text=True)
    if kept.returncode:
        raise LookupError(f"no history back to {TAG}: {kept.stderr.strip()}")
    shutil.unpack_archive(f"{source}.tar", source, filter="data")
    return install_wheel(source, folder)
