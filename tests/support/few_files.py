"""What becomes of a medium where its process may open few files, or none. Runs as a process of its own."""

import json
import os
import resource
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from keye.config.job import ImagePart
from keye.config.settings import Settings
from keye.worker.host_fault import host_fault_of
from keye.worker.media.job_media import MediaCache, MediaLimits, fetch

MAX_FILES = 10


def outcomes_with_few_files(uri: str, folder: Path, *, is_cold: bool, **settings: Any) -> list[str]:
    """With no file that may be opened, with one, two ..., and at last without a limit.

    The content, in hexadecimal, "host" for a fault of the host, or whatever else was raised. With `is_cold` nothing was
    fetched before. `web_port` of the settings is where all of https leads to.
    """
    arguments = json.dumps([uri, str(folder), is_cold, settings])
    command = [sys.executable, "-m", "tests.support.few_files", arguments]
    ran = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=100)
    outcomes: list[str] = json.loads(ran.stdout)
    return outcomes


def _outcomes(uri: str, folder: str, is_cold: bool, settings: dict[str, Any]) -> list[str]:
    if (port := settings.pop("web_port", None)) is not None:
        _lead_to(port)
    limits = MediaLimits.of(Settings(**settings))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def try_with(num_files: int | None) -> str:
        # Another for each, that nothing is kept from before.
        cache = MediaCache(Path(folder, str(num_files)), 2**24)
        free = [number for number in range(100) if not os.path.exists(f"/proc/self/fd/{number}")]
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft if num_files is None else free[num_files], hard))
            (medium,) = fetch([ImagePart(uri=uri)], limits, cache)
        except Exception as error:
            return "host" if host_fault_of(error) else repr(error)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        with medium as file:
            return file.read().hex()

    if not is_cold:
        try_with(None)
    return [*map(try_with, range(MAX_FILES)), try_with(None)]


def _lead_to(port: int) -> None:
    """A public address that is a server here."""

    def dial(_: object, timeout: float) -> socket.socket:
        connection = socket.socket()
        connection.settimeout(timeout)
        connection.connect(("127.0.0.1", port))
        return connection

    socket.create_connection = dial  # type: ignore[assignment]
    socket.getaddrinfo = lambda *_, **__: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.215.14", 443))]


if __name__ == "__main__":
    print(json.dumps(_outcomes(*json.loads(sys.argv[1]))))
