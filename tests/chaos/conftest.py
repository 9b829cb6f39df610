"""A server that may itself be killed, its client and its workers; and the table of gates at the end of a run."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import pytest
from pydantic import SecretStr

from keye.config.settings import Settings
from keye.producer import Client, Job
from tests.chaos.broker import Broker
from tests.chaos.echo_workers import EchoWorkers
from tests.chaos.ledger import assert_each_succeeded_once, assert_nothing_is_left
from tests.support.scale import SCALE


class Gate(Protocol):
    def __call__(self, what: str, seen: str, bound: str) -> None: ...


@pytest.fixture
def lease_seconds() -> float:
    return SCALE.lease_seconds


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    broker = Broker(tmp_path / "valkey")
    yield broker
    broker.stop()


@pytest.fixture
def client(broker: Broker, lease_seconds: float) -> Iterator[Client]:
    with Client(Settings(redis_url=SecretStr(broker.url), lease_seconds=lease_seconds)) as client:
        yield client


@pytest.fixture
def workers(broker: Broker, tmp_path: Path, lease_seconds: float) -> Iterator[EchoWorkers]:
    workers = EchoWorkers(broker.url, broker.redis, tmp_path, lease_seconds)
    yield workers
    workers.end()


@pytest.fixture
def assert_all_is_well(broker: Broker, client: Client, lease_seconds: float) -> Callable[[list[Job]], None]:
    """Each of the jobs succeeded once, and nothing is left of them or of any other."""

    def check(jobs: list[Job]) -> None:
        assert_each_succeeded_once(broker.redis, jobs)
        assert_nothing_is_left(client, broker.redis, lease_seconds)

    return check


@pytest.fixture
def gate(record_property: Callable[[str, object], None]) -> Gate:
    """Notes a figure beside its bound, for the table; asserting is the test's."""

    def note(what: str, seen: str, bound: str) -> None:
        record_property("gate", [what, seen, bound])

    return note


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    rows = [["gate", "seen", "bound", ""]]
    for outcome, mark in (("passed", "pass"), ("failed", "FAIL"), ("skipped", "skipped")):
        for report in terminalreporter.getreports(outcome):
            if "tests/chaos/" in report.nodeid and report.when == ("setup" if outcome == "skipped" else "call"):
                gates = [value for name, value in report.user_properties if name == "gate"]
                rows += [[*row, mark] for row in gates or [[report.nodeid.partition("::")[2], "", ""]]]
    if len(rows) == 1:
        return
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    terminalreporter.section("gates")
    for row in rows:
        terminalreporter.line("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
