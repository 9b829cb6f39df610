"""A worker of our own for the demo, the tests and the benchmarks: `keye-worker run` on the CPU with the small Keye."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from keye.config.connection import connect
from keye.config.presence import WorkerState, list_present

SMALL_KEYE = Path(__file__).with_name("checkpoint")
"""The trained checkpoint that ships with the project."""

# How long a worker that is not ready may show nothing: its log does not grow, and it does not say that it is loading.
QUIET_SECONDS = 60.0


# `keye-worker run`, by the names that the release before has, too: PYTHONPATH may lead to that.
PROGRAM = """
import sys
from keye.worker.daemon.child import die_with_parent
from keye.worker.daemon.cli import main
die_with_parent(int(sys.argv.pop()))
sys.argv.append("run")
main()
"""


class LocalWorker:
    """Started on entering and ready when that returns; drained and gone on leaving, at once where that is by an error.

    Its log goes to `log`, what it downloads into a folder beside that; it reads no `.env` but one that lies there. It
    does not outlive the thread that enters.
    """

    def __init__(self, redis_url: str, log: Path, settings: Mapping[str, str]) -> None:
        """`settings` are environment variables besides the broker, the small checkpoint and the CPU.

        Entering raises `RuntimeError` where the worker ends, or shows nothing for `QUIET_SECONDS`, before it is ready.
        """
        self.log = log
        self._folder = log.absolute().parent
        self._redis_url = redis_url
        chosen = {
            "KEYE_REDIS_URL": redis_url,
            "KEYE_REDIS_PASSWORD": "",
            "KEYE_MODEL_PATH": str(SMALL_KEYE),
            "KEYE_DEVICE": "cpu",
            "KEYE_CACHE_FOLDER": str(self._folder / "cache"),
            "KEYE_SPOOL_FOLDER": str(self._folder / "spool"),
            "KEYE_RUN_FOLDER": str(self._folder / "run"),
        }
        self._environment = {**os.environ, **chosen, **settings}

    def __enter__(self) -> Self:
        with self.log.open("wb") as output:
            command = [sys.executable, "-P", "-c", PROGRAM, str(os.getpid())]
            self.process = subprocess.Popen(
                command, env=self._environment, cwd=self._folder, stdout=output, stderr=subprocess.STDOUT
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self._cut_off()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is not None:
            self._cut_off()
        else:
            self.process.terminate()
            self.process.wait()

    def _cut_off(self) -> None:
        # The second of two forces the end; two of the same could arrive as one.
        for number in (signal.SIGTERM, signal.SIGINT):
            self.process.send_signal(number)
        self.process.wait()

    def _wait_until_ready(self) -> None:
        shown, shown_at = 0, time.monotonic()
        with connect(self._redis_url, key_prefix=self._environment.get("KEYE_KEY_PREFIX", "")) as redis:
            while self.process.poll() is None and time.monotonic() - shown_at < QUIET_SECONDS:
                states = {presence.state for presence in list_present(redis)}
                if WorkerState.READY in states:
                    return
                size = self.log.stat().st_size
                if states or size != shown:
                    shown, shown_at = size, time.monotonic()
                time.sleep(0.05)
        how = "showed nothing" if self.process.poll() is None else "ended"
        raise RuntimeError(f"The worker {how} before it was ready. Its log:\n{self.log.read_text()}")
