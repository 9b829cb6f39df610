"""The compose file is valid, each setting of `.env` arrives in its workers, and its broker keeps jobs."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from keye.config.settings import Settings
from tests.support.checkout import ROOT
from tests.support.debian import need

COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
EXAMPLE = (ROOT / "config/worker.env.example").read_text()
# To YAML, to a URL, to a shell and to compose.
PASSWORD = "p@s: #/%25w$x"
GIVEN = {
    "KEYE_REDIS_PASSWORD": f"'{PASSWORD}'",
    "KEYE_S3_ENDPOINT_URL": "https://minio.example:9000",
    "KEYE_PRECISION": "int8",
    "AWS_SESSION_TOKEN": "token",
    "KEYE_CACHE_FOLDER": "/of/the/host",
}


@pytest.fixture(params=["docker compose", "docker-compose"])
def services(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """All of them, as this compose resolves the file beside an edited copy of the example."""
    command = request.param.split()
    need(command[0])
    if len(command) == 2 and subprocess.run([*command, "version"], capture_output=True).returncode:
        pytest.skip("this docker has no compose")
    shutil.copy(ROOT / "docker-compose.yml", tmp_path)
    written = "".join(f"{name}={value}\n" for name, value in GIVEN.items())
    (tmp_path / ".env").write_text(EXAMPLE + written)
    every_profile = [
        f"--profile={name}" for service in COMPOSE["services"].values() for name in service.get("profiles", ())
    ]
    clean = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME")}
    shown = subprocess.run(
        [*command, *every_profile, "config"], cwd=tmp_path, env=clean, capture_output=True, text=True
    )
    assert shown.returncode == 0, shown.stderr
    # What is printed may be read as a compose file again, so that a dollar is two.
    return yaml.safe_load(shown.stdout.replace("$$", "$"))["services"]


@pytest.mark.holds("docs/deploy.md#docker-compose", "Every line of `.env` reaches the workers")
def test_every_setting_of_the_env_file_arrives_in_the_workers(services: dict[str, Any]) -> None:
    for name in ("worker", "worker-cpu"):
        environment = services[name]["environment"]
        assert environment["KEYE_REDIS_PASSWORD"] == PASSWORD
        assert environment["KEYE_S3_ENDPOINT_URL"] == GIVEN["KEYE_S3_ENDPOINT_URL"]
        assert environment["AWS_SESSION_TOKEN"] == "token"
        # What lies where in the container is not the host's to say.
        assert environment["KEYE_CACHE_FOLDER"] == "/var/tmp/keye-media"
    assert services["worker"]["environment"]["KEYE_PRECISION"] == "int8"


@pytest.mark.holds("docs/deploy.md#docker-compose", "Passwords stand in single quotes, as they are")
def test_broker_is_started_with_the_password(services: dict[str, Any]) -> None:
    command = services["redis"]["command"]
    assert command[command.index("--requirepass") + 1] == PASSWORD
    assert services["flower"]["environment"]["KEYE_REDIS_PASSWORD"] == PASSWORD


@pytest.mark.holds("README.md#run-a-worker", "Compose starts the same")
@pytest.mark.holds(
    "docs/deploy.md#docker-compose",
    "Every container has a read-only root, no capabilities",
    "Nothing is published beyond loopback.",
)
def test_what_it_is_started_for_and_what_it_does_without_rights() -> None:
    profiles = {name: service.get("profiles") for name, service in COMPOSE["services"].items()}
    monitoring = {name: ["monitoring"] for name in ("flower", "prometheus", "grafana")}
    assert profiles == {"redis": None, "worker": ["gpu"], "worker-cpu": ["cpu"], **monitoring}
    for service in COMPOSE["services"].values():
        assert service["read_only"]
        assert service["init"]
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))


@pytest.mark.holds("docs/operations.md#how-do-i-stop-or-restart-a-worker-without-losing-jobs", "what we ship does")
def test_a_stop_gives_a_worker_its_whole_drain() -> None:
    grace_seconds = float(COMPOSE["x-worker"]["stop_grace_period"].removesuffix("s"))
    assert grace_seconds > Settings.model_fields["drain_seconds"].default + 10


def test_an_unset_password_is_told(tmp_path: Path) -> None:
    need("docker-compose")
    shutil.copy(ROOT / "docker-compose.yml", tmp_path)
    (tmp_path / ".env").write_text(EXAMPLE.replace("KEYE_REDIS_PASSWORD", "REDIS_PASSWORD"))
    shown = subprocess.run(["docker-compose", "config"], cwd=tmp_path, capture_output=True, text=True)
    assert shown.returncode != 0
    assert "set it in .env" in shown.stderr


def test_the_example_names_settings_only() -> None:
    known = {f"KEYE_{name.upper()}" for name in Settings.model_fields}
    assert set(re.findall(r"^#?(KEYE_\w+)=", EXAMPLE, re.MULTILINE)) <= known
    assert {name for name in COMPOSE["x-worker"]["environment"] if name.startswith("KEYE_")} <= known


@pytest.mark.holds("docs/operations.md#what-must-be-true-of-redis", "`config/redis.conf` has the first two")
def test_broker_of_the_stack_never_drops_jobs() -> None:
    lines = (ROOT / "config" / "redis.conf").read_text().splitlines()
    assert "appendonly yes" in lines
    assert "maxmemory-policy noeviction" in lines
