"""A password of Redis that a URL can hold only escaped, given as it is."""

from collections.abc import Iterator
from urllib.parse import quote

import pytest
from pydantic import SecretStr
from redis import Redis

from keye.config.settings import ProducerSettings
from keye.producer import Client, QueueUnavailable
from keye.worker.daemon.exit_codes import ExitCode
from tests.acceptance.conftest import Start
from tests.support.redis_login import log_in

RUN = ("keye.worker.daemon.cli", "run")

PASSWORD = "p@s:s/w#o%41r?d &é"


@pytest.fixture
def settings(redis: Redis, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Of a user with that password; this process has them, too."""
    redis.execute_command("ACL", "SETUSER", "keeper", "on", f">{PASSWORD}", "~*", "&*", "+@all")
    settings = {"KEYE_REDIS_URL": log_in(redis_url, "keeper"), "KEYE_REDIS_PASSWORD": PASSWORD}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    yield settings
    redis.execute_command("ACL", "DELUSER", "keeper")


@pytest.mark.holds("docs/operations.md#what-must-be-true-of-redis", "stands as it is in `KEYE_REDIS_PASSWORD`")
def test_producer_and_worker_use_it_and_print_it_nowhere(start: Start, settings: dict[str, str]) -> None:
    worker = start(*RUN, **settings)
    with Client() as client:
        assert client.submit(prompt="What is this?").result(150).answer
    worker.ask_to_end()
    assert worker.exit_code() == ExitCode.OK
    assert PASSWORD not in worker.log
    assert quote(PASSWORD, safe="") not in worker.log


def test_a_wrong_one_is_told(start: Start, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    worker = start(*RUN, **settings | {"KEYE_REDIS_PASSWORD": "another"})
    assert worker.exit_code(60) == ExitCode.PREFLIGHT_FAILED
    assert "invalid username-password pair" in worker.log
    monkeypatch.setenv("KEYE_REDIS_PASSWORD", "another")
    with Client() as client, pytest.raises(QueueUnavailable, match="invalid username-password pair"):
        client.submit(prompt="?")


def test_a_server_that_is_named_in_the_program_is_not_told_it(settings: dict[str, str]) -> None:
    with Client(settings["KEYE_REDIS_URL"]) as client, pytest.raises(QueueUnavailable):
        client.submit(prompt="?")


@pytest.mark.parametrize(
    ("given", "full"),
    [
        ("redis://cache:6379/0", "redis://:p%40%2F@cache:6379/0"),
        ("rediss://me@cache/1?protocol=3", "rediss://me:p%40%2F@cache/1?protocol=3"),
        ("unix:///run/a@b.sock?db=2", "unix://:p%40%2F@/run/a@b.sock?db=2"),
        ("redis://:its-own@cache:6379/0", "redis://:its-own@cache:6379/0"),
    ],
)
def test_it_joins_every_kind_of_url_but_one_that_has_its_own(given: str, full: str) -> None:
    settings = ProducerSettings(redis_url=SecretStr(given), redis_password=SecretStr("p@/"))
    assert settings.full_redis_url() == full
