"""What is written past the log, on real pipes: none makes its writer wait, and all of it comes out where it is read."""

import os
import re
import select
import subprocess
import sys
from pathlib import Path

import pytest

ALIVE = """
import os, subprocess, sys
from keye.worker.telemetry.standard_streams import tell_threads, wait_for_no_reader
for user in sys.argv[1:]:
    os.setuid(int(user))
wait_for_no_reader()
"""
TOLD = """
os.write(2, b"ours\\n")
subprocess.run(["sh", "-c", "echo a child of ours >&2"])
tell_threads(seconds=10)
os.abort()
"""
# A pipe holds a sixteenth of it.
FLOOD = """
try:
    for _ in range(2**20):
        os.write(2, b"x")
except BlockingIOError:
    tell_threads(seconds=0.1)
    sys.exit(3)
"""
# Opened by another user, as before `setpriv` or `sudo`; only root can become one.
only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
USERS = [pytest.param([], id="the same user"), pytest.param(["65534"], id="another", marks=only_root)]


@pytest.mark.parametrize("user", USERS)
def test_what_is_read_comes_out_to_the_last_word(user: list[str]) -> None:
    ended = subprocess.run([sys.executable, "-c", ALIVE + TOLD, *user], capture_output=True, text=True, timeout=60)
    ours, child, *threads = ended.stderr.splitlines()
    assert (ours, child) == ("ours", "a child of ours")
    assert any(line.endswith("in <module>") for line in threads)


def test_of_hundreds_of_threads_those_that_rest_alike_are_told_once_and_the_one_that_differs() -> None:
    program = """
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event, Thread
def hang(): Event().wait(60)
Thread(target=hang, name="the-one", daemon=True).start()
pool, met = ThreadPoolExecutor(300, "rests"), Barrier(301)
for _ in range(300):
    pool.submit(met.wait)
met.wait()
pool.submit(int).result()
tell_threads(seconds=10)
"""
    ended = subprocess.run([sys.executable, "-c", ALIVE + program], capture_output=True, text=True, timeout=60)
    assert re.search(r"^Thread the-one \(most recent call first\):(\n  .*)+ in hang$", ended.stderr, re.MULTILINE)
    assert re.search(r"^Thread rests_\d+, rests_\d+, rests_\d+ and \d+ more ", ended.stderr, re.MULTILINE)
    assert ended.stderr.count("Thread ") < 30


@pytest.mark.holds(
    "docs/operations.md#what-does-the-log-say", "what a full pipe or a stopped terminal does not take of it"
)
@pytest.mark.parametrize("user", USERS)
def test_nobody_waits_for_a_reader_and_whoever_has_the_same_stderr_keeps_it_as_it_was(user: list[str]) -> None:
    reader, writer = os.pipe()
    ended = subprocess.run([sys.executable, "-c", ALIVE + FLOOD, *user], stderr=writer, timeout=60)
    assert ended.returncode == 3
    assert os.get_blocking(writer)
    assert not select.select([], [writer], [], 0)[1]
    os.close(writer)
    os.close(reader)


def test_what_is_opened_after_a_closed_stderr_is_not_written_to(tmp_path: Path) -> None:
    program = f"""{ALIVE}
with open("connection", "w"):
    os.write(1, b"to stdout")
    os.write(2, b"to stderr")
    subprocess.run(["sh", "-c", "echo a child of ours >&2"], check=True)
"""
    subprocess.run(["sh", "-c", 'exec "$@" >&- 2>&-', "-", sys.executable, "-c", program], cwd=tmp_path, check=True)
    assert (tmp_path / "connection").read_text() == ""
