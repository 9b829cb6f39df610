"""`keye cancel --all-queued`: who is asked, what is cancelled, and what goes on."""

import json
import os
from collections import Counter

import pytest
from redis import Redis
from typer.testing import CliRunner

from keye.config import keys
from keye.config.codes import JobState
from keye.config.connection import connect
from keye.config.wire import SealedJob
from keye.producer import Cancellation, Client, Job, JobNotFound
from keye.producer.cli import app
from keye.producer.shell import ExitCode
from keye.worker.leases.job_lease import LeaseStore
from tests.support.checkout import PYTHONPATH
from tests.support.conditions import eventually
from tests.support.leased_jobs import claim
from tests.support.terminal import KEYE, Terminal, wait_until_shown

CANCEL = (*KEYE, "cancel", "--all-queued")


@pytest.fixture
def keye(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    monkeypatch.setenv("KEYE_REDIS_URL", redis_url)
    return CliRunner()


@pytest.fixture
def environ(redis_url: str) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("KEYE_", "COLUMNS", "LINES"))}
    return {**own, "PYTHONPATH": PYTHONPATH, "KEYE_REDIS_URL": redis_url}


def begin(redis_url: str, job: Job) -> None:
    """As a worker does."""
    with connect(redis_url) as worker:
        sealed = SealedJob.model_validate_json(worker.hget(keys.record(job.id), "sealed") or "")
        claim(LeaseStore(worker, lease_seconds=30), sealed)


def states(client: Client) -> Counter[str]:
    ledger, irregularities = client.verify()
    assert irregularities == []
    return ledger.num_in_state


@pytest.mark.holds(
    "docs/operations.md#which-jobs-are-there-and-how-do-i-get-rid-of-a-flood",
    "Jobs that run are left alone, and so are those that began meanwhile",
)
def test_all_that_wait_are_cancelled_and_none_that_runs(keye: CliRunner, client: Client, redis_url: str) -> None:
    runs, high, low = (client.submit(prompt="?", priority=priority) for priority in ("normal", "high", "low"))
    begin(redis_url, runs)
    told = keye.invoke(app, ["cancel", "--all-queued", "--yes"])
    assert told.stdout.splitlines() == [f"{high.id} cancelled", f"{low.id} cancelled"]
    assert (told.exit_code, told.stderr) == (ExitCode.OK, "2 cancelled\n")
    assert states(client) == {"RUNNING": 1, "CANCELLED": 2}
    assert not client._transport.redis.hget(keys.record(runs.id), "cancel_requested")
    again = keye.invoke(app, ["cancel", "--all-queued"])
    assert (again.exit_code, again.stdout, again.stderr) == (ExitCode.OK, "", "0 cancelled\n")


@pytest.mark.holds(
    "docs/operations.md#which-jobs-are-there-and-how-do-i-get-rid-of-a-flood",
    "`keye cancel --all-queued` says how many are queued and asks",
)
def test_without_a_terminal_nothing_is_cancelled_that_was_not_said_for_sure(keye: CliRunner, client: Client) -> None:
    job = client.submit(prompt="?")
    told = keye.invoke(app, ["cancel", "--all-queued"])
    assert told.exit_code == ExitCode.INVALID
    assert told.stderr == "Cancel 1 queued job? Standard input is no terminal to ask at: say --yes.\n"
    assert job.state is JobState.QUEUED
    for odd in (["cancel"], ["cancel", job.id, "--all-queued", "--yes"]):
        assert keye.invoke(app, odd).exit_code == ExitCode.INVALID
    assert job.state is JobState.QUEUED


@pytest.mark.holds(
    "docs/operations.md#which-jobs-are-there-and-how-do-i-get-rid-of-a-flood",
    "`keye cancel --all-queued` says how many are queued and asks",
)
def test_who_is_asked_may_say_no(environ: dict[str, str], client: Client) -> None:
    jobs = [client.submit(prompt="?") for _ in range(2)]
    with Terminal(CANCEL, environ) as terminal:
        wait_until_shown(terminal, "Cancel 2 queued jobs? [y/N]")
        terminal.type("\n")
        assert terminal.ended() == ExitCode.OK
        eventually(lambda: "None was cancelled." in terminal.said)
    assert {job.state for job in jobs} == {JobState.QUEUED}


@pytest.mark.holds(
    "docs/operations.md#which-jobs-are-there-and-how-do-i-get-rid-of-a-flood",
    "Jobs that run are left alone, and so are those that began meanwhile",
)
def test_what_begins_while_somebody_thinks_about_it_runs_on(
    environ: dict[str, str], client: Client, redis_url: str
) -> None:
    begins, waits = (client.submit(prompt="?") for _ in range(2))
    with Terminal(CANCEL, environ) as terminal:
        wait_until_shown(terminal, "Cancel 2 queued jobs? [y/N]")
        begin(redis_url, begins)
        terminal.type("y\n")
        assert terminal.ended() == ExitCode.OK
        eventually(lambda: "1 began meanwhile and run on" in terminal.said)
        assert f"{begins.id} left_running" in terminal.said
    assert (begins.state, waits.state) == (JobState.RUNNING, JobState.CANCELLED)
    assert not client._transport.redis.hget(keys.record(begins.id), "cancel_requested")


def test_a_job_that_redis_refuses_to_cancel_does_not_keep_the_others(
    keye: CliRunner, client: Client, redis: Redis
) -> None:
    jobs = [client.submit(prompt="?") for _ in range(3)]
    redis.set(keys.events(jobs[1].id), "no stream")
    told = keye.invoke(app, ["cancel", "--all-queued", "--yes", "--json"])
    lines = [json.loads(line) for line in told.stdout.splitlines()]
    assert [line["cancellation"] for line in lines] == ["cancelled", None, "cancelled"]
    assert "WRONGTYPE" in lines[1]["error"]
    assert told.stderr.splitlines()[-1] == "2 cancelled, 1 refused"
    assert told.exit_code == ExitCode.UNAVAILABLE
    done = dict(client.cancel_queued([jobs[0].id, "nobody"]))
    assert done[jobs[0].id] is Cancellation.CANCELLED
    assert isinstance(done["nobody"], JobNotFound)


@pytest.mark.holds(
    "docs/operations.md#which-jobs-are-there-and-how-do-i-get-rid-of-a-flood",
    "Cut off in between, each job is either cancelled or queued, and the same command goes on.",
)
def test_cut_off_in_between_each_is_cancelled_or_queued(
    environ: dict[str, str], keye: CliRunner, client: Client
) -> None:
    client.submit_many([{"prompt": "?"}] * 1000)
    with Terminal((*CANCEL, "--yes"), environ, stop_at="cancelled") as terminal:
        eventually(lambda: "cancelled" in terminal.said)
        terminal.type("\x03")
        terminal.read_on()
        assert terminal.ended() != ExitCode.OK
    found = states(client)
    assert found["QUEUED"] > 0
    assert found["CANCELLED"] > 0
    rest = keye.invoke(app, ["cancel", "--all-queued", "--yes"])
    assert rest.stderr == f"{found['QUEUED']:,} cancelled\n"
    assert states(client) == {"CANCELLED": 1000}
