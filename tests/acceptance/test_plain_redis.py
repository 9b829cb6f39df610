"""A producer that knows nothing but Redis' commands and docs/producers.md, at a worker that echoes."""

import json
import time
import uuid
from typing import Any

import pytest
from redis import Redis

from keye.config.topology import message
from keye.producer import Client, JobNotFound
from tests.acceptance.conftest import ECHO, Start

LISTS = {"high": "keye.jobs", "normal": "keye.jobs\x06\x163", "low": "keye.jobs\x06\x166"}


def make_job(prompt: str, priority: str = "normal") -> dict[str, Any]:
    job = {"prompt": prompt, "priority": priority}
    return {"schema_version": 1, "job_id": str(uuid.uuid4()), "submitted_at": time.time(), "job": job}


def write_record(redis: Redis, sealed: dict[str, Any], deadline_at: float | str = "") -> str:
    facts = {"priority": sealed["job"]["priority"], "submitted_at": sealed["submitted_at"], "deadline_at": deadline_at}
    record = {"state": "QUEUED", "sealed": json.dumps(sealed), **facts, "attempts": 0, "max_attempts": 3}
    redis.hset(f"keye:job:{sealed['job_id']}", mapping=record)
    return sealed["job_id"]


def push(redis: Redis, sealed: dict[str, Any], is_recorded: bool = True) -> None:
    priority = sealed["job"]["priority"]
    whole = json.loads(message(sealed["job_id"], json.dumps(sealed), priority))
    assert whole["headers"].pop("keye_recorded")
    if is_recorded:
        whole["headers"]["keye_recorded"] = True
    redis.lpush(LISTS[priority], json.dumps(whole))


def wait(redis: Redis, job_id: str, seconds: float = 60) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Its events to the last, and its outcome."""
    events: list[dict[str, Any]] = []
    seen, until = "0", time.monotonic() + seconds
    while not events or events[-1]["type"] != "ended":
        assert time.monotonic() < until, events
        for _, entries in redis.xread({f"keye:job:{job_id}:events": seen}, block=1000) or ():
            events += [json.loads(fields["event"]) for _, fields in entries]
            seen = entries[-1][0]
    return events, json.loads(redis.hget(f"keye:job:{job_id}", "outcome"))


@pytest.mark.holds(
    "docs/producers.md#from-any-language",
    "Make the sealed job, `{",
    "Write the record, the hash `keye:job:<id>`",
    "Push the message for the workers onto the list of the job's priority",
    "To wait, block on the stream `keye:job:<id>:events` until",
    "An outcome of the kind `result` has the answer",
    "Every event but `ended` has the `attempt` it belongs to.",
    "To hear of all jobs that end, block on the stream `keye:ended`",
)
@pytest.mark.holds(
    "docs/producers.md#how-do-i-submit-jobs",
    "Three ways: the Python client, the `keye` command, or plain Redis commands",
)
def test_jobs_of_each_priority_are_answered_and_told_of(start: Start, redis: Redis) -> None:
    start(*ECHO).wait_until_ready()
    ids = []
    for priority in LISTS:
        sealed = make_job(f"hello {priority}", priority)
        ids.append(write_record(redis, sealed))
        push(redis, sealed)
        events, outcome = wait(redis, ids[-1])
        assert (outcome["kind"], outcome["answer"]) == ("result", f"hello {priority}")
        assert {event.get("attempt") for event in events[:-1]} == {1}
    sealed = make_job("raise ValueError")
    ids.append(write_record(redis, sealed))
    push(redis, sealed)
    _, outcome = wait(redis, ids[-1])
    assert (outcome["kind"], outcome["code"], bool(outcome["message"])) == ("failure", "INTERNAL", True)

    ((_, first), *_) = redis.xread({"keye:ended": "0"}, block=1000)
    assert [(fields["job_id"], fields["state"]) for _, fields in first] == [
        *((job_id, "SUCCEEDED") for job_id in ids[:3]),
        (ids[3], "FAILED"),
    ]
    ((_, rest),) = redis.xread({"keye:ended": first[1][0]}, block=1000)
    assert [fields["job_id"] for _, fields in rest] == ids[2:]


@pytest.mark.holds(
    "docs/producers.md#from-any-language",
    "Between steps 2 and 3, `ZADD keye:leases <now + 30> <id>` has them publish the job",
)
def test_workers_publish_and_end_what_they_were_told_of(start: Start, redis: Redis) -> None:
    start(*ECHO, KEYE_LEASE_SECONDS="1").wait_until_ready()
    lost = write_record(redis, make_job("hello"))
    redis.zadd("keye:leases", {lost: time.time() + 1})
    soon = time.time() + 1
    late = write_record(redis, make_job("never taken"), soon)
    redis.zadd("keye:deadlines", {late: soon})
    assert wait(redis, lost)[1]["answer"] == "hello"
    events, outcome = wait(redis, late)
    assert (events[-1]["state"], outcome["code"]) == ("EXPIRED", "DEADLINE_EXCEEDED")


@pytest.mark.holds("docs/producers.md#from-any-language", "To stop a running job, set the field `cancel_requested`")
def test_a_running_job_is_stopped_at_once(start: Start, redis: Redis) -> None:
    start(*ECHO).wait_until_ready()
    sealed = make_job("wait 600")
    job_id = write_record(redis, sealed)
    push(redis, sealed)
    redis.xread({f"keye:job:{job_id}:events": "0"}, block=60_000)
    began_at = time.monotonic()
    redis.hset(f"keye:job:{job_id}", "cancel_requested", "1")
    redis.publish("keye:cancellations", job_id)
    _, outcome = wait(redis, job_id)
    assert outcome["code"] == "CANCELLED"
    assert time.monotonic() - began_at < 4  # without the channel a worker looks every ten seconds


@pytest.mark.holds(
    "docs/producers.md#from-any-language",
    "Step 2 may be left out",
    "Until that moment nobody can see or cancel the job.",
)
def test_the_record_may_be_left_to_the_worker(start: Start, redis: Redis, client: Client) -> None:
    sealed = make_job("hello")
    push(redis, sealed, is_recorded=False)
    for ask in (client.find, lambda job_id: client.job(job_id).cancel()):
        with pytest.raises(JobNotFound):
            ask(sealed["job_id"])
    start(*ECHO).wait_until_ready()
    assert wait(redis, sealed["job_id"])[1]["answer"] == "hello"
    assert client.find(sealed["job_id"]).result().answer == "hello"


@pytest.mark.holds("docs/producers.md#from-any-language", "redis-cli HGET keye:job:$id state")
def test_a_job_is_looked_at_from_a_terminal(redis: Redis, client: Client) -> None:
    job = client.submit(prompt="?")
    job.cancel()
    page = " ".join(redis.execute_command("HGET", f"keye:job:{job.id}", name) for name in ("state", "outcome"))
    assert page.startswith('CANCELLED {"')
    (entries,) = redis.xread({f"keye:job:{job.id}:events": "0-0"}, block=2000)
    assert '"ended"' in entries[1][-1][1]["event"]
