"""The release before this one: what a fleet that is being upgraded, or a producer of last month, still runs."""

import shutil
import subprocess
from pathlib import Path

from tests.support.checkout import ROOT
from tests.support.wheel import install_wheel

# The tag and the commit it stands on: a clone may come without tags. Readers of 0.1.0 are strict: before a report
# gets a new field, the next release has to be tagged and named here.
TAG = "v0.1.0"
COMMIT = "9ac34edb0e8da6fdca9d65c3c22a3a7e20d86f1d"


def unpack_release(folder: Path) -> Path:
    """Install the wheel of the release, built from its source in git, into a folder for PYTHONPATH.

    Raises `LookupError` where the clone does not reach back to it.
    """
    source = folder / "source"
    archive = ["git", "archive", "--format=zip", f"--output={source}.zip", COMMIT]
    kept = subprocess.run(archive, cwd=ROOT, capture_output=True, text=True)
    if kept.returncode:
        raise LookupError(f"no history back to {TAG}: {kept.stderr.strip()}")
    shutil.unpack_archive(f"{source}.zip", source)
    return install_wheel(source, folder)
