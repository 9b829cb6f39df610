"""Dead letters and quarantined messages that others wrote into: each is told of, and costs its neighbours nothing."""

import json
from collections.abc import Callable

import pytest
from redis import Redis
from typer.testing import CliRunner

from keye.config import keys
from keye.config.codes import ErrorCode
from keye.config.faults import InvalidJob, JobUnreadable, UnknownSchemaVersion
from keye.config.quarantine import entry_of
from keye.config.topology import QUEUE
from keye.producer import Cancellation, Client
from keye.producer.cli import app
from keye.producer.shell import ExitCode
from tests.integration.test_dead_letters import fail

Spoil = Callable[[Redis, str], object]


def put_another_type(redis: Redis, job_id: str) -> None:
    redis.delete(keys.record(job_id))
    redis.rpush(keys.record(job_id), "no hash")


def seal_as_newer(redis: Redis, job_id: str) -> None:
    sealed = json.loads(redis.hget(keys.record(job_id), "sealed"))
    redis.hset(keys.record(job_id), "sealed", json.dumps({**sealed, "schema_version": 99}))


def set_field(name: str, value: str) -> Spoil:
    return lambda redis, job_id: redis.hset(keys.record(job_id), name, value)


# What was done to a letter's record; of these none can be sent again.
NOT_SENT: dict[str, Spoil] = {
    "no hash": put_another_type,
    "a newer schema": seal_as_newer,
    "no JSON": set_field("sealed", "{"),
    "deep JSON": set_field("sealed", "[" * 100_000),
    "no job": set_field("sealed", '{"schema_version": 1, "job": 7}'),
    "no input": lambda redis, job_id: redis.hdel(keys.record(job_id), "sealed"),
    "nothing but a mark": lambda redis, job_id: (
        redis.delete(keys.record(job_id)),
        redis.hset(keys.record(job_id), "?", ""),
    ),
}
# What is wrong with these is in none's way, but their failure or their attempts cannot be told.
NOT_TOLD: dict[str, Spoil] = {
    "no outcome": lambda redis, job_id: redis.hdel(keys.record(job_id), "outcome"),
    "a broken outcome": set_field("outcome", "{"),
    "another outcome": set_field("outcome", '{"kind": "verdict"}'),
    "a broken attempt": set_field("attempt:1", "[]"),
}
WITHOUT_FAILURE = ("no hash", "nothing but a mark", "no outcome", "a broken outcome", "another outcome")


def spoiled(client: Client, redis: Redis, ways: dict[str, Spoil]) -> tuple[dict[str, str], str, str]:
    """A letter for each way, by its name, between two good ones; their ids."""
    first = client.submit(prompt="first")
    fail(redis, first)
    ids = {}
    for name, spoil in ways.items():
        job = client.submit(prompt=name)
        fail(redis, job)
        spoil(redis, job.id)
        ids[name] = job.id
    last = client.submit(prompt="last")
    fail(redis, last)
    return ids, first.id, last.id


@pytest.fixture
def keye(redis_url: str) -> Callable[..., tuple[int, list[str], list[str]]]:
    def invoke(*arguments: str) -> tuple[int, list[str], list[str]]:
        told = CliRunner().invoke(app, ["dead", *arguments], env={"KEYE_REDIS_URL": redis_url})
        assert told.exception is None or isinstance(told.exception, SystemExit)
        return told.exit_code, told.stdout.splitlines(), told.stderr.splitlines()

    return invoke


Keye = Callable[..., tuple[int, list[str], list[str]]]


@pytest.mark.holds(
    "docs/operations.md#which-jobs-failed-for-good-and-how-do-i-send-them-again",
    "What cannot be read of a letter stops nothing:",
    "the command ends with 2",
)
def test_requeue_goes_on_behind_what_cannot_be_sent(client: Client, redis: Redis, keye: Keye) -> None:
    ids, first, last = spoiled(client, redis, NOT_SENT)
    code, requeued, told = keye("requeue", "--all")
    assert code == ExitCode.INVALID == 2
    assert [line.split(" -> ")[0] for line in requeued] == [first, last]
    assert [line.split(": ")[0] for line in told] == list(ids.values())
    assert all(len(line.split(": ", 1)[1]) > 20 for line in told), told
    assert redis.llen(f"{QUEUE}\x06\x163") == len(ids) + 4, "each its first message, two a second"
    assert [letter.job_id for letter in client.dead_letters.select()] == list(ids.values())

    code, rows, _ = keye("requeue", "--all", "--json")
    assert code == 2
    facts = [json.loads(row) for row in rows]
    assert [fact["job_id"] for fact in facts] == list(ids.values())
    assert all(fact["requeued_as"] is None and fact["error"] for fact in facts)
    assert "schema version 99" in facts[list(ids).index("a newer schema")]["error"]


def test_what_only_cannot_be_told_is_sent_again(client: Client, redis: Redis, keye: Keye) -> None:
    ids, first, last = spoiled(client, redis, NOT_TOLD)
    code, requeued, told = keye("requeue", "--all")
    assert (code, told) == (0, [])
    assert [line.split(" -> ")[0] for line in requeued] == [first, *ids.values(), last]


@pytest.mark.holds(
    "docs/operations.md#which-jobs-failed-for-good-and-how-do-i-send-them-again",
    "`purge` forgets those too",
)
def test_list_tells_which_cannot_be_read_and_purge_forgets_them(client: Client, redis: Redis, keye: Keye) -> None:
    ids, first, last = spoiled(client, redis, NOT_SENT | NOT_TOLD)
    code, rows, _ = keye("list")
    assert code == 2
    assert [row.split()[0] for row in rows] == [first, *ids.values(), last]
    unreadable = {row.split()[0] for row in rows if "unreadable: " in row}
    assert unreadable == {ids[name] for name in WITHOUT_FAILURE}

    code, rows, _ = keye("list", "--json")
    facts = {fact["job_id"]: fact for fact in map(json.loads, rows)}
    assert (code, list(facts)) == (2, [first, *ids.values(), last])
    assert facts[first]["failure"]["code"] == "OUT_OF_MEMORY"
    assert facts[ids["no hash"]]["failure"] is facts[ids["no hash"]]["sealed"] is None
    assert facts[ids["a broken attempt"]]["attempts"] is None
    assert f"HGETALL keye:job:{ids['no JSON']}" in facts[ids["no JSON"]]["unreadable"]
    for name, job_id in ids.items():
        code, shown, _ = keye("show", job_id)
        assert shown[0].startswith(job_id), name
        assert "unreadable: " in "".join(shown), name

    assert keye("purge", "--all", "--yes") == (0, [first, *ids.values(), last], [])
    assert redis.exists(*map(keys.record, ids.values())) == 0


def test_key_of_another_type_costs_its_own_letter_alone(client: Client, redis: Redis, keye: Keye) -> None:
    jobs = [client.submit(prompt="?", idempotency_key=str(number)) for number in range(3)]
    for job in jobs:
        fail(redis, job)
    redis.delete(keys.idempotency("1"))
    redis.rpush(keys.idempotency("1"), "no string")
    code, purged, told = keye("purge", "--all", "--yes")
    assert code == ExitCode.UNAVAILABLE
    assert purged == [jobs[0].id, jobs[2].id]
    assert [line.split(": ")[0] for line in told] == [jobs[1].id]
    assert "WRONGTYPE" in told[0]


def test_full_queue_ends_the_command_at_once(client: Client, redis: Redis, keye: Keye, monkeypatch) -> None:
    for _ in range(3):
        fail(redis, client.submit(prompt="?"))
    client.submit(prompt="waits")
    monkeypatch.setenv("KEYE_MAX_QUEUE_DEPTH", "2")
    code, requeued, told = keye("requeue", "--all")
    assert (code, len(requeued), len(told)) == (ExitCode.FULL, 1, 1)


def test_python_reads_of_a_letter_what_can_be_read(client: Client, redis: Redis) -> None:
    ids, first, last = spoiled(client, redis, NOT_SENT | NOT_TOLD)
    letters = {letter.job_id: letter for letter in client.dead_letters.select()}
    assert list(letters) == [first, *ids.values(), last]
    of_no_code = {ids[name] for name in WITHOUT_FAILURE}
    with_code = [letter.job_id for letter in client.dead_letters.select([ErrorCode.OUT_OF_MEMORY])]
    assert with_code == [job_id for job_id in letters if job_id not in of_no_code]
    for name in NOT_TOLD:
        assert client.dead_letters.find(ids[name]).job.prompt == name
    with pytest.raises(JobUnreadable, match="outcome of job"):
        assert letters[ids["another outcome"]].failure
    with pytest.raises(JobUnreadable, match="input of job"):
        assert letters[ids["no JSON"]].job
    with pytest.raises(UnknownSchemaVersion):
        client.dead_letters.requeue(letters[ids["a newer schema"]])
    with pytest.raises(InvalidJob):
        client.dead_letters.requeue(letters[ids["no job"]])
    for letter in letters.values():
        client.dead_letters.purge(letter)
    assert list(client.dead_letters.select()) == []


def test_times_that_no_calendar_has_stop_no_list(client: Client, redis: Redis, keye: Keye) -> None:
    early, late = client.submit(prompt="?"), client.submit(prompt="?")
    fail(redis, early)
    fail(redis, late)
    redis.zadd(keys.DEAD_LETTERS, {early.id: "inf"})
    code, rows, _ = keye("list")
    assert (code, {row.split()[0] for row in rows}) == (0, {early.id, late.id})


@pytest.mark.holds(
    "docs/operations.md#what-became-of-a-message-that-no-worker-could-read",
    "What a stranger put into the stream is listed as a message, too.",
)
def test_stranger_in_quarantine_is_listed_shown_and_purged_as_a_message(redis: Redis, keye: Keye) -> None:
    whole = entry_of(b"lost", "it is no JSON", "gpu-1:7", None)
    entries = [whole, {"hello": "\x1b[2J"}, {**whole, "raw": "a"}, {**whole, "size": "many"}, whole]
    ids = [redis.xadd(keys.QUARANTINE, fields) for fields in entries]
    ids.append(redis.xadd(keys.QUARANTINE, whole, id=f"{2**64 - 1}-1"))
    code, rows, _ = keye("list", "--messages")
    assert (code, [row.split()[0] for row in rows]) == (0, ids)
    assert all("cannot be read" in row for row in rows[1:4])
    assert [json.loads(row)["message_id"] for row in keye("list", "--messages", "--json")[1]] == ids
    assert '{"hello": "\\u001b[2J"}' in keye("show", ids[1])[1]
    assert keye("purge", "--messages", "--all", "--yes") == (0, ids, [])
    assert redis.xlen(keys.QUARANTINE) == 0


@pytest.mark.parametrize(
    ("field", "value"), [("outcome", "{"), ("attempts", "many"), ("ended_at", "late"), ("deadline_at", "soon")]
)
def test_verify_names_a_record_that_cannot_be_read_and_looks_at_the_others(
    client: Client, redis: Redis, field: str, value: str
) -> None:
    odd, lost = client.submit(prompt="?"), client.submit(prompt="?")
    if field in ("outcome", "ended_at"):
        fail(redis, odd)
    redis.hset(keys.record(odd.id), field, value)
    redis.hset(keys.record(lost.id), "state", "LOST")
    ledger, found = client.verify()
    assert {irregularity.job_id for irregularity in found} == {odd.id, lost.id}
    (what,) = (irregularity.what for irregularity in found if irregularity.job_id == odd.id)
    assert "cannot read" in what
    assert set(ledger.records) == {odd.id, lost.id}


def test_status_counts_beside_a_record_of_another_type(client: Client, redis: Redis) -> None:
    jobs = [client.submit(prompt="?") for _ in range(3)]
    put_another_type(redis, jobs[0].id)
    redis.zadd(keys.LEASES, {jobs[0].id: 1e10})
    assert [queue.depth for queue in client.status().queues] == [0, 3, 0]


def test_job_whose_input_is_no_json_can_be_cancelled(client: Client, redis: Redis) -> None:
    job = client.submit(prompt="?")
    redis.hset(keys.record(job.id), "sealed", "{")
    assert job.cancel() is Cancellation.CANCELLED
