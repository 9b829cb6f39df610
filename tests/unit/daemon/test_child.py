"""A worker process cannot outlive its supervisor. The kernel's way is tried in tests/acceptance."""

import signal
import subprocess
import sys


def test_without_the_kernels_help_a_closed_pipe_ends_the_process() -> None:
    code = "from worker.daemon.child import _watch_stdin; print(1, flush=True); _watch_stdin()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdin is not None
        child.stdout.readline()
        assert child.poll() is None
        child.stdin.close()
        assert child.wait(timeout=5) == -signal.SIGKILL


def test_a_process_whose_supervisor_is_gone_already_ends_at_once() -> None:
    code = "from worker.daemon.child import die_with_parent; die_with_parent(parent_pid=0); print('alive')"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL
    assert ended.stdout == ""
