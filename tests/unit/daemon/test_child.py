"""A worker process cannot outlive its supervisor. The kernel's way is tried in tests/acceptance."""

import signal
import subprocess
import sys


def test_a_process_whose_supervisor_is_gone_already_ends_at_once() -> None:
    code = "from keye.worker.daemon.child import die_with_parent; die_with_parent(parent_pid=0); print('alive')"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL
    assert ended.stdout == ""
