"""Programs of Debian, which our lock does not bring. At home a test skips without them; .ci/run installs them."""

import os
import shutil

import pytest

# What .ci/run does not install: another's program, and one that is there where it matters.
OPTIONAL = ("docker", "systemd-analyze")


def need(program: str) -> str:
    """Its path; skips by its name where it is not installed, and fails where REQUIRE_ECOSYSTEM=1 says that it is."""
    # Where plain users have no path of it, Debian puts what only root may use.
    found = shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if found is None:
        complain = pytest.fail if os.environ.get("REQUIRE_ECOSYSTEM") and program not in OPTIONAL else pytest.skip
        complain(f"{program} is not installed")
    return found
