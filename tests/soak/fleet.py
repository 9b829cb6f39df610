"""Two worker hosts and a store, each of which may be away and comes back as what it was."""

import threading
from contextlib import suppress
from pathlib import Path

import boto3
import psutil
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from tests.acceptance.conftest import Start
from tests.support.conditions import eventually
from tests.support.ports import free_port

BUCKET = "demo"


class Host:
    """`keye-worker run`, which is always started with the same port and folders."""

    def __init__(self, start: Start, folder: Path, **settings: str) -> None:
        self._start = start
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        kept = {f"KEYE_{name}_FOLDER": str(folder / name.lower()) for name in ("RUN", "SPOOL", "CACHE")}
        self._settings = settings | kept | {"KEYE_METRICS_PORT": str(self.port), "KEYE_HOST_WORKERS": "2"}
        self.begin()

    def begin(self) -> None:
        self._started = self._start("keye.worker.daemon.cli", "run", **self._settings)

    @property
    def worker(self) -> psutil.Process:
        """Its decoders are its children."""
        return eventually(psutil.Process(self._started.process.pid).children)[0]

    def memory_bytes(self) -> int:
        """Of all its processes, but for those that end meanwhile: what no file and no other process has."""
        total = 0
        for process in self._tree():
            with suppress(psutil.NoSuchProcess):
                memory = process.memory_info()
                total += memory.rss - memory.shared
        return total

    def kill(self) -> None:
        """As when it loses its power."""
        for process in self._tree():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._started.process.wait()

    def end(self) -> None:
        self._started.ask_to_end()
        assert self._started.exit_code(within_seconds=90) == 0, self._started.log

    def _tree(self) -> list[psutil.Process]:
        supervisor = psutil.Process(self._started.process.pid)
        return [supervisor, *supervisor.children(recursive=True)]


class Store:
    """An S3 server."""

    def __init__(self) -> None:
        self._port = free_port()
        self._app = DomainDispatcherApplication(create_backend_app)
        self.url = f"http://127.0.0.1:{self._port}"
        self.come_back()
        keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
        self._client = boto3.client("s3", endpoint_url=self.url, **keys)
        self._client.create_bucket(Bucket=BUCKET)

    def upload(self, path: Path) -> str:
        self._client.upload_file(str(path), BUCKET, path.name)
        return f"s3://{BUCKET}/{path.name}"

    def come_back(self) -> None:
        self._server = make_server("127.0.0.1", self._port, self._app, threaded=True)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def go_away(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
