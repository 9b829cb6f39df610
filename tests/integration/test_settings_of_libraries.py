"""Libraries that were built in a folder which is anybody's here take no settings from there."""

import subprocess
import sys
from pathlib import Path

import pytest

# In a view of the file system of its own: what waits for the pipe here would be every import of av on this machine.
VIEW = """
mkdir -p /tmp/vendor && mount -t tmpfs keye-test /tmp/vendor || exit 77
mkdir -p /tmp/vendor/etc/gnutls && mkfifo /tmp/vendor/etc/gnutls/config
exec "$@"
"""


@pytest.mark.parametrize("module", ["keye.worker.media.decode.decoder", "keye.worker.daemon.planning"])
def test_a_pipe_where_gnutls_was_built_holds_up_nobody(module: str, tmp_path: Path) -> None:
    command = ["unshare", "--mount", "sh", "-c", VIEW, "-", sys.executable, "-c"]
    try:
        done = subprocess.run([*command, f"import {module}, av"], cwd=tmp_path, capture_output=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("no unshare here")
    if done.returncode in (1, 77) and b"import" not in done.stderr:
        pytest.skip(f"no file system may be mounted here: {done.stderr.decode()}")
    assert done.returncode == 0, done.stderr
