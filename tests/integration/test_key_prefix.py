"""Clients whose names all begin with a prefix, on the real server."""

import ast
import re
from pathlib import Path

import pytest
from pydantic import SecretStr
from redis import Redis
from redis.commands.core import CoreCommands
from typer.testing import CliRunner

from keye.config import key_prefix
from keye.config.connection import connect
from keye.config.faults import InvalidSettings
from keye.config.settings import ProducerSettings
from keye.producer import AsyncClient, Client
from keye.producer.cli import app
from keye.producer.shell import ExitCode
from keye.worker.results.outbox import Spool
from tests.support.checkout import ROOT


@pytest.mark.parametrize("protocol", [2, 3])
def test_names_have_the_prefix_in_redis_and_none_in_answers(redis: Redis, redis_url: str, protocol: int) -> None:
    with connect(f"{redis_url}?protocol={protocol}", key_prefix="blue:") as blue:
        assert blue.set("keye:one", "1")
        with blue.pipeline() as writing:
            writing.xadd("keye:s", {"event": "x"}, id="1-1")
            writing.zadd("keye:z", {"job": 1})
            writing.execute()
        assert sorted(redis.keys()) == ["blue:keye:one", "blue:keye:s", "blue:keye:z"]
        redis.set("keye:two", "2")
        assert list(blue.scan_iter("keye:[ot]*")) == ["keye:one"]
        with blue.pipeline(transaction=False) as reading:
            reading.xread({"keye:s": "0"})
            reading.zrange("keye:z", 0, -1)
            streams, ids = reading.execute()
        assert ([*dict(streams)], ids) == (["keye:s"], ["job"])
        assert [*dict(blue.xread({"keye:s": "0", "keye:none": "0"}))] == ["keye:s"]
        script = blue.register_script("return {KEYS[1], KEYS[2], ARGV[1]}")
        assert script(["keye:one", "keye:two"], ["keye:three"]) == ["blue:keye:one", "blue:keye:two", "keye:three"]
        with blue.pubsub() as heard:
            heard.subscribe("keye:only-here")
            assert heard.get_message(timeout=5)["type"] == "subscribe"
            assert blue.publish("keye:only-here", "x") == 1
            assert redis.publish("keye:only-here", "y") == 0
            assert heard.get_message(timeout=5)["data"] == "x"
        assert blue.delete("keye:one", "keye:two", "keye:s", "keye:z") == 3
    assert redis.keys() == ["keye:two"]


def test_a_command_of_which_it_is_not_known_where_its_names_are_is_not_sent(redis: Redis, redis_url: str) -> None:
    redis.set("keye:one", "1")
    with connect(redis_url, key_prefix="blue:") as blue:
        for send in (
            blue.flushall,
            blue.keys,
            lambda: blue.rename("keye:one", "keye:two"),
            lambda: next(blue.scan_iter()),
        ):
            with pytest.raises(NotImplementedError, match="cannot be sent with a key prefix"):
                send()
    assert redis.keys() == ["keye:one"]


@pytest.mark.holds(
    "docs/operations.md#how-do-several-deployments-share-a-server",
    "so it ends with one of `-`, `_`, `.` and `:`; letters and digits may be before that, 64 in all",
)
def test_a_prefix_that_celery_would_add_to_or_redis_take_for_a_pattern_is_refused(redis_url: str) -> None:
    for prefix in ("blue", "*:", "bl ue:", "blau\n", "ä:", f"{'n' * 64}:", "{blue}:"):
        with pytest.raises(InvalidSettings, match=r"KEYE_KEY_PREFIX: .* cannot begin the names of keys"):
            Client(redis_url, key_prefix=prefix)
    for prefix in ("", ":", "team-7.blue_", f"{'n' * 63}:"):
        with Client(redis_url, key_prefix=prefix) as client:
            assert client.status().workers == ()


@pytest.mark.holds("docs/producers.md#from-python", "without the argument that variable counts here too")
@pytest.mark.holds(
    "docs/operations.md#how-do-several-deployments-share-a-server", "Producers have the same value as workers"
)
def test_the_environment_has_the_prefix_where_the_program_says_none(
    redis: Redis, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEYE_KEY_PREFIX", "blue:")
    with Client(redis_url) as blue, Client(redis_url, key_prefix="") as none:
        job = blue.submit(prompt="?")
        assert redis.exists(f"blue:keye:job:{job.id}")
        assert (len(blue.verify()[0].records), len(none.verify()[0].records)) == (1, 0)
        told = CliRunner().invoke(app, ["cancel", job.id, "--redis-url", redis_url])
        assert told.exit_code == ExitCode.OK, told.output
        assert job.state == "CANCELLED"


def test_settings_have_a_prefix_of_their_own(redis_url: str) -> None:
    settings = ProducerSettings(redis_url=SecretStr(redis_url), key_prefix="blue:")
    for make in (Client, AsyncClient):
        with pytest.raises(TypeError, match="of settings it is a field"):
            make(settings, key_prefix="red:")


def test_outcomes_that_wait_on_disk_are_delivered_to_their_own_deployment_alone(redis_url: str, tmp_path: Path) -> None:
    folders = set()
    for prefix in ("", "a:", "b:"):
        with connect(redis_url, key_prefix=prefix) as redis:
            folders.add(Spool.of(redis, tmp_path).folder)
    assert len(folders) == 3


def test_of_all_commands_that_we_send_it_is_known_where_their_names_are(redis_url: str) -> None:
    """Clients and pipelines are known by what they are called, their commands by redis-py's methods."""
    methods = dir(CoreCommands)
    sent = set()
    for file in (path for room in ("config", "producer", "worker") for path in (ROOT / room).rglob("*.py")):
        tree = ast.parse(file.read_text())
        called = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        pipelines = {
            item.optional_vars.id
            for node in ast.walk(tree)
            if isinstance(node, ast.With)
            for item in node.items
            if "pipeline(" in ast.unparse(item.context_expr) and isinstance(item.optional_vars, ast.Name)
        }
        for function in called:
            if isinstance(function, ast.Attribute) and function.attr in methods:
                place = ast.unparse(function.value)
                if place in pipelines or place.rpartition(".")[2] in ("redis", "_redis"):
                    sent.add(function.attr)
    assert {"hget", "zadd", "xread", "pttl", "scan_iter"} < sent
    names = {"delete": "DEL", "scan_iter": None, "register_script": None, "xinfo_stream": "XINFO STREAM"}
    named = {names.get(each, each.upper().replace("_", " ")) for each in sent} - {None}
    known = key_prefix._NAMELESS | key_prefix._FIRST_IS_NAME | key_prefix._ALL_ARE_NAMES | {"XREAD"}
    assert named <= known


def test_no_script_makes_a_name_of_an_argument() -> None:
    """It would begin without the prefix."""
    scripts = {path.name: path.read_text() for path in (ROOT / "config/scripts").glob("*.lua")}
    assert len(scripts) > 10
    assert [name for name, text in scripts.items() if re.search(r'call\(\s*"\w+",\s*ARGV', text)] == []
