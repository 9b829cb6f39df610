"""Loads the atomic moves of a job's record. Each script names its keys and arguments in its head."""

from pathlib import Path

from redis import Redis
from redis.commands.core import Script

SCRIPTS = Path(__file__).parent / "scripts"


def load_script(redis: Redis, name: str) -> Script:
    """The script `scripts/<name>.lua`, sent to the server on first use and again after the server forgot it."""
    return redis.register_script((SCRIPTS / f"{name}.lua").read_text())
