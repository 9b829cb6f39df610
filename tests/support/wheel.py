"""A wheel of some source of ours: what a user installs, without the checkout around it."""

import subprocess
import sys
from pathlib import Path


def install_wheel(source: Path, folder: Path) -> Path:
    """Build it and install it, without what it depends on, into a folder for PYTHONPATH; commands are in its `bin`.

    The build leaves its marks in `source`, which should be a copy.
    """
    packages = folder / "packages"
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    offline = ("--no-deps", "--no-index")
    build = (*pip, "wheel", *offline, "--no-build-isolation", "--wheel-dir", folder, source)
    subprocess.run(build, check=True, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    install = (*pip, "install", *offline, "--no-compile", "--target", packages, wheel)
    subprocess.run(install, check=True, cwd=folder)
    return packages
