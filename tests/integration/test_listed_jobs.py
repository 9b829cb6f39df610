"""`keye list` and `keye status JOB` on a real server: what each tells, and of what nobody can read."""

import json
import os
import re
import time
from collections.abc import Iterator

import pytest
from redis import Redis
from typer.testing import CliRunner, Result

from keye.config import keys
from keye.config.codes import ErrorCode, JobState
from keye.config.connection import connect
from keye.config.event import FramesDecoded, TextGenerated
from keye.config.wire import SealedJob
from keye.producer import Client, Job
from keye.producer.cli import app
from keye.producer.shell import ExitCode
from keye.worker.leases.claims import Claimed
from keye.worker.leases.job_lease import LeaseStore
from keye.worker.results.settlement import Settlement
from tests.support import leased_jobs
from tests.support.checkout import PYTHONPATH
from tests.support.conditions import eventually
from tests.support.leased_jobs import a_failure, an_answer
from tests.support.terminal import KEYE, Terminal

WORKER = "gpu-host-1:4711"


@pytest.fixture
def worker(redis_url: str) -> Iterator[Redis]:
    with connect(redis_url) as connection:
        yield connection


def claim(worker: Redis, job: Job) -> Claimed:
    sealed = SealedJob.model_validate_json(worker.hget(keys.record(job.id), "sealed") or "")
    return leased_jobs.claim(LeaseStore(worker, lease_seconds=30), sealed, WORKER)


def lines(result: Result) -> list[str]:
    assert result.exit_code == ExitCode.OK, result.stderr
    return result.stdout.splitlines()


@pytest.fixture
def jobs(client: Client, worker: Redis) -> dict[str, Job]:
    """One in each state, submitted in this order, an hour apart."""
    names = ("waits", "runs", "answered", "failed", "cancelled", "late")
    jobs = {name: client.submit(prompt="?") for name in names}
    settlement = Settlement(worker, 3600, 9000)
    claim(worker, jobs["runs"])
    settlement.settle(lease := claim(worker, jobs["answered"]), an_answer(lease))
    settlement.settle(lease := claim(worker, jobs["failed"]), a_failure(lease))
    lease = claim(worker, jobs["late"])
    settlement.settle(lease, a_failure(lease).model_copy(update={"code": ErrorCode.DEADLINE_EXCEEDED}))
    jobs["cancelled"].cancel()
    now = time.time()
    for hours, job in enumerate(reversed(jobs.values())):
        worker.hset(keys.record(job.id), "submitted_at", now - hours * 3600 - 60)
    return jobs


@pytest.mark.holds(
    "docs/operations.md#which-jobs-are-there-and-how-do-i-get-rid-of-a-flood", "A line for each job, the newest first"
)
def test_each_job_is_a_line_of_where_it_is_the_newest_first(keye: CliRunner, jobs: dict[str, Job]) -> None:
    ids = {name: job.id for name, job in jobs.items()}
    assert lines(keye.invoke(app, ["list"])) == [
        f"{ids['late']}   1m EXPIRED {WORKER}",
        f"{ids['cancelled']}   1h CANCELLED",
        f"{ids['failed']}   2h FAILED INTERNAL {WORKER}",
        f"{ids['answered']}   3h SUCCEEDED {WORKER}",
        f"{ids['runs']}   4h RUNNING open {WORKER}",
        f"{ids['waits']}   5h QUEUED",
    ]


@pytest.mark.holds(
    "docs/operations.md#which-jobs-are-there-and-how-do-i-get-rid-of-a-flood", "keye list --state RUNNING --older 2h"
)
@pytest.mark.parametrize(
    ("options", "names"),
    [
        ("--state RUNNING --older 2h", ["runs"]),
        ("--code MEDIA_NOT_FOUND --since 30m", []),
        ("--state QUEUED --state running", ["runs", "waits"]),
        ("--code INTERNAL --code CANCELLED", ["cancelled", "failed"]),
        ("--code INTERNAL --state CANCELLED", []),
        ("--code INTERNAL --state RUNNING", []),
        ("--since 90m", ["late", "cancelled"]),
        ("--older 4h", ["runs", "waits"]),
        ("--since 200m --older 90m --state FAILED --state SUCCEEDED", ["failed", "answered"]),
    ],
)
def test_jobs_are_chosen_by_state_code_and_age(
    keye: CliRunner, jobs: dict[str, Job], options: str, names: list[str]
) -> None:
    told = [json.loads(line) for line in lines(keye.invoke(app, ["list", "--json", *options.split()]))]
    assert [each["job_id"] for each in told] == [jobs[name].id for name in names]


@pytest.mark.holds(
    "docs/operations.md#which-jobs-are-there-and-how-do-i-get-rid-of-a-flood",
    "In a terminal lines end where that does; `--json` has all of it.",
)
def test_a_job_is_one_line_in_a_narrow_terminal_too(redis_url: str, jobs: dict[str, Job]) -> None:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("KEYE_", "COLUMNS"))}
    with Terminal((*KEYE, "list"), {**own, "PYTHONPATH": PYTHONPATH, "KEYE_REDIS_URL": redis_url}) as terminal:
        assert terminal.ended() == ExitCode.OK
        eventually(lambda: jobs["waits"].id in terminal.said)
        shown = terminal.screen
    assert [line.split()[0] for line in shown] == [job.id for job in reversed(list(jobs.values()))]
    assert max(map(len, shown)) == 60
    assert shown[2] == f"{jobs['failed'].id}   2h FAILED INTERNAL g…"


def test_the_newest_are_listed_and_the_others_counted(keye: CliRunner, jobs: dict[str, Job]) -> None:
    listed = keye.invoke(app, ["list", "--limit", "2"])
    assert [line.split()[0] for line in lines(listed)] == [jobs["late"].id, jobs["cancelled"].id]
    assert listed.stderr == "4 more (--limit)\n"
    assert keye.invoke(app, ["list", "--since", "soon"]).exit_code == ExitCode.INVALID
    assert keye.invoke(app, ["list", "--state", "ODD"]).exit_code == ExitCode.INVALID


@pytest.mark.holds(
    "docs/operations.md#which-jobs-are-there-and-how-do-i-get-rid-of-a-flood",
    "A record that a stranger has written into is `unreadable`",
)
def test_what_strangers_put_in_the_place_of_records_is_listed_as_unreadable(
    keye: CliRunner, client: Client, redis: Redis
) -> None:
    good, no_code, no_number = (client.submit(prompt="?").id for _ in range(3))
    redis.hset(keys.record(no_code), mapping={"state": "FAILED", "outcome": "{"})
    redis.hset(keys.record(no_number), mapping={"attempts": "many", "claimed_at": "nan"})
    redis.set(keys.record("text"), "x")
    redis.hset(keys.record("empty"), "x", "y")
    redis.hset(keys.record("newer"), mapping={"state": "PAUSED", "submitted_at": "1"})
    told = {each["job_id"]: each for each in map(json.loads, lines(keye.invoke(app, ["list", "--json"])))}
    assert {name for name, each in told.items() if not each["is_readable"]} == {no_code, no_number, "text", "empty"}
    assert {name: each["state"] for name, each in told.items()} == {
        good: "QUEUED",
        no_code: "FAILED",
        no_number: "QUEUED",
        "text": None,
        "empty": None,
        "newer": "PAUSED",
    }
    shown = lines(keye.invoke(app, ["list"]))
    assert "text    ? unreadable" in shown
    assert any(line.startswith(no_code) and line.endswith("unreadable FAILED") for line in shown)


def test_more_records_than_a_round_trip_reads_are_all_listed(client: Client, redis: Redis) -> None:
    client.submit_many([{"prompt": "?"}] * 1500)
    listing = client.list_jobs(limit=None)
    assert len({job.job_id for job in listing.jobs}) == listing.num_found == 1500
    times = [job.submitted_at for job in listing.jobs]
    assert times == sorted(times, reverse=True)  # type: ignore[type-var]


def test_a_queued_job_tells_how_many_go_before_it(keye: CliRunner, client: Client) -> None:
    first, second = client.submit(prompt="?"), client.submit(prompt="?")
    assert "place   the next" in lines(keye.invoke(app, ["status", first.id]))
    told = lines(keye.invoke(app, ["status", second.id]))
    assert told[0] == f"job     {second.id}"
    assert re.match(r"state   QUEUED for \d+s, since 20", told[1])
    assert told[2:] == [
        "stage   queued, no attempt yet",
        "place   1 before it",
        "left    not known",
        "worker  none is alive with its model loaded",
    ]


def test_a_running_job_tells_its_frames_its_tokens_and_its_worker(
    keye: CliRunner, client: Client, worker: Redis
) -> None:
    job = client.submit(prompt="?")
    claim(worker, job)
    worker.hset(keys.record(job.id), "claimed_at", time.time() - 125)
    worker.set(keys.CONTEXT, 1)
    for event in (
        FramesDecoded(media_index=0, done=128, total=1280, attempt=1, at=1),
        TextGenerated(channel="answer", text="a", offset=0, num_tokens=1312, attempt=1, at=2),
    ):
        worker.xadd(keys.events(job.id), {"event": event.model_dump_json()})
    told = lines(keye.invoke(app, ["status", job.id]))
    assert told[1].startswith("state   RUNNING for 2m, since 20")
    assert told[2:] == [
        "stage   generate, attempt 1",
        "frames  128 of 1,280",
        "tokens  1,312",
        "left    not known",
        f"worker  {WORKER}",
    ]
    as_json = json.loads(*lines(keye.invoke(app, ["status", job.id, "--json"])))
    assert as_json.items() >= {**json.loads(job.progress.model_dump_json()), "worker": WORKER}.items()
    assert 125 <= as_json["seconds"] < 185


def test_a_job_that_waits_for_another_attempt_tells_why_and_until_when(
    keye: CliRunner, client: Client, worker: Redis
) -> None:
    job = client.submit(prompt="?")
    lease = claim(worker, job)
    LeaseStore(worker, 30).retry(lease, a_failure(lease), 60, None)
    told = lines(keye.invoke(app, ["status", job.id]))
    assert re.match(r"state   QUEUED for \d+s, since 20", told[1])
    assert "stage   queued, attempt 1, retry" in told
    assert f"worker  {WORKER}, the last" in told
    assert any(line.startswith("due     not before 20") for line in told)


@pytest.mark.holds("docs/producers.md#from-the-shell", '`keye status "$id"` tells how far a job is, `keye list`')
def test_an_ended_job_tells_how_it_ended(keye: CliRunner, jobs: dict[str, Job]) -> None:
    told = lines(keye.invoke(app, ["status", jobs["failed"].id]))
    assert told[1].startswith("state   FAILED for ")
    assert told[2:] == ["why     INTERNAL in decode, attempt 1: it broke", f"worker  {WORKER}"]
    assert json.loads(*lines(keye.invoke(app, ["status", jobs["answered"].id, "--json"])))["state"] == "SUCCEEDED"
    as_json = json.loads(*lines(keye.invoke(app, ["status", jobs["cancelled"].id, "--json"])))
    assert (as_json["code"], as_json["ended_in"], as_json["worker"]) == ("CANCELLED", "queued", None)


def test_a_job_that_is_not_there_or_cannot_be_read_is_no_state(keye: CliRunner, client: Client, redis: Redis) -> None:
    assert keye.invoke(app, ["status", "nobody"]).exit_code == ExitCode.NOT_FOUND
    job = client.submit(prompt="?")
    redis.hset(keys.record(job.id), "submitted_at", "soon")
    told = keye.invoke(app, ["status", job.id])
    assert (told.exit_code, told.stdout) == (ExitCode.INVALID, "")
    assert "nothing that this release can read" in told.stderr
    assert client.find(job.id).state is JobState.QUEUED
