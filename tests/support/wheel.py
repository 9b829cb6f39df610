"""A wheel of some source of ours: what a user installs, without the checkout around it."""

import subprocess
import sys
from pathlib import Path


def install_wheel(source: Path, folder: Path) -> Path:
    """Build it and install it, without what it depends on, into a folder for PYTHONPATH; commands are in its `bin`.

    The build leaves its marks in `source`, which should be a copy.
    """
    packages = folder / "packages"
    uv = (sys.executable, "-m", "uv", "--quiet", "--offline")
    build = (*uv, "build", "--wheel", "--no-build-isolation", "--python", sys.executable, "--out-dir", folder, source)
    subprocess.run(build, check=True, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    install = (*uv, "pip", "install", "--no-deps", "--python", sys.executable, "--target", packages, wheel)
    subprocess.run(install, check=True, cwd=folder)
    (packages / ".lock").unlink(missing_ok=True)  # uv's own
    return packages
