"""The release before this one: what a fleet that is being upgraded, or a producer of last month, still runs."""

import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).parents[2]

# The tag and the commit it stands on: a clone may come without tags. Readers of 0.1.0 are strict: before a report
# gets a new field, the next release has to be tagged and named here.
TAG = "v0.1.0"
COMMIT = "9ac34edb0e8da6fdca9d65c3c22a3a7e20d86f1d"


def unpack_release(folder: Path) -> Path:
    """Build the wheel of the release from its source in git, and unpack it into a folder for PYTHONPATH.

    Raises `LookupError` where the clone does not reach back to it.
    """
    source, packages = folder / "source", folder / "packages"
    archive = ["git", "archive", "--format=zip", f"--output={source}.zip", COMMIT]
    kept = subprocess.run(archive, cwd=ROOT, capture_output=True, text=True)
    if kept.returncode:
        raise LookupError(f"no history back to {TAG}: {kept.stderr.strip()}")
    _unzip(source.with_suffix(".zip"), source)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*build, "--wheel-dir", folder, source], check=True, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    _unzip(wheel, packages)
    return packages


def _unzip(file: Path, folder: Path) -> None:
    with ZipFile(file) as archive:
        archive.extractall(folder)
