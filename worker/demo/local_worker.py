"""A worker of our own for the demo, the tests and the benchmarks: `keye-worker run` on the CPU with the small Keye."""

import os
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


class LocalWorker:
    """Started on entering and ready when that returns; drained and gone on leaving.

    Its log goes to `log`, what it downloads into a folder beside that; it reads no `.env` but one that lies there.
    """

    def __init__(self, redis_url: str, log: Path, settings: Mapping[str, str], *, ready_seconds: float = 60.0) -> None:
        """`settings` are environment variables besides the broker, the small checkpoint and the CPU; a worker that is
        not ready after `ready_seconds` is ended with `RuntimeError`.
        """
        self.log = log
        self._folder = log.absolute().parent
        self._ready_seconds = ready_seconds
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
            command = [sys.executable, "-P", "-m", "keye.worker.daemon.cli", "run"]
            self.process = subprocess.Popen(
                command, env=self._environment, cwd=self._folder, stdout=output, stderr=subprocess.STDOUT
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._end()

    def _end(self) -> None:
        self.process.terminate()
        self.process.wait()

    def _wait_until_ready(self) -> None:
        end = time.monotonic() + self._ready_seconds
        with connect(self._redis_url, key_prefix=self._environment.get("KEYE_KEY_PREFIX", "")) as redis:
            while time.monotonic() < end and self.process.poll() is None:
                if any(presence.state is WorkerState.READY for presence in list_present(redis)):
                    return
                time.sleep(0.05)
        raise RuntimeError(
            f"The worker was not ready within {self._ready_seconds:g} s. Its log:\n{self.log.read_text()}"
        )
