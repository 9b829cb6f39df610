"""The compose file is valid, and its broker keeps jobs."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def compose_command() -> list[str] | None:
    """The plugin where there is one, else the older program of its own."""
    if shutil.which("docker") and not subprocess.run(["docker", "compose", "version"], capture_output=True).returncode:
        return ["docker", "compose"]
    return ["docker-compose"] if shutil.which("docker-compose") else None


def test_compose_file_is_valid_and_complete() -> None:
    compose = compose_command()
    if compose is None:
        pytest.skip("docker compose is not installed")
    given = {"REDIS_PASSWORD": "secret", "MODEL_DIR": "/model", "MEDIA_DIR": "/media"}
    command = [*compose, "-f", "docker-compose.yml", "config"]
    shown = subprocess.run(command, cwd=ROOT, env={**os.environ, **given}, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "KEYE_REDIS_URL: redis://:secret@redis:6379/0" in shown.stdout


def test_broker_of_the_stack_never_drops_jobs() -> None:
    lines = (ROOT / "config" / "redis.conf").read_text().splitlines()
    assert "appendonly yes" in lines
    assert "maxmemory-policy noeviction" in lines
