"""Messages that no worker could read, as the operator finds them: a real server, the real client and `keye`."""

import json
import time
from base64 import b64decode
from collections.abc import Callable

import pytest
from redis import Redis
from typer.testing import CliRunner

from keye.config import keys
from keye.config.codes import Stage
from keye.config.faults import MessageNotFound
from keye.config.outcome import JobFailure
from keye.config.quarantine import MAX_KEPT_BYTES, entry_of
from keye.config.topology import QUEUE, UNACKED, message_list, message_lists
from keye.producer import Client, Priority
from keye.producer.cli import app
from keye.producer.shell import ExitCode

Keye = Callable[..., tuple[int, str]]

HOUR = 3600
NO_MESSAGES = [
    b"",
    b"\xff\xfe no text",
    b"[" * 100_000,
    b'{"headers":' * 100_000,
    b"[" + b"{}," * 2_000_000 + b"{}]",
    b"[]",
    b"7",
    b'"headers"',
    b'{"headers": ["id"]}',
    b'{"headers": {"id": ["a", "list"]}, "properties": []}',
    b'{"headers": {"id": {"deep": {}}}}',
    b'{"headers": {"id": "two words"}}',
    b'{"headers": {"id": "\\ud800"}}',
    b"9" * 10_000,
]


@pytest.fixture
def keye(redis_url: str) -> Keye:
    def invoke(*arguments: str) -> tuple[int, str]:
        told = CliRunner().invoke(app, arguments, env={"KEYE_REDIS_URL": redis_url})
        assert told.exception is None or isinstance(told.exception, SystemExit)
        return told.exit_code, told.output

    return invoke


def put(
    redis: Redis, raw: bytes, reason: str = "it is no JSON", job_id: str | None = None, seconds_ago: float = 0
) -> str:
    """Into quarantine, as a worker does; its id. The earlier ones first."""
    entry_id = f"{int((time.time() - seconds_ago) * 1000)}-*"
    return redis.xadd(keys.QUARANTINE, entry_of(raw, reason, "gpu-1:7", job_id), id=entry_id)


def fail(redis: Redis, client: Client) -> str:
    """A dead letter, as settling leaves it; its job's id."""
    job = client.submit(prompt="?")
    failure = JobFailure(
        job_id=job.id, code="INTERNAL", message="It broke.", stage=Stage.GENERATE, retryable=False, attempts=1
    )
    outcome = {"outcome": failure.model_dump_json(), "worker": "gpu-1:7", "claimed_at": "1", "ended_at": "2"}
    redis.hset(keys.record(job.id), mapping={"state": "FAILED", **outcome})
    redis.zadd(keys.DEAD_LETTERS, {job.id: time.time()})
    return job.id


def is_plain(output: str) -> bool:
    """No character in it but the ends of its lines does anything to a terminal."""
    return all(line.isprintable() for line in output.split("\n"))


@pytest.mark.holds(
    "docs/alerts.md#keyequarantinegrows",
    "`keye dead list --messages --since 2h` says why each could not be read.",
)
@pytest.mark.holds(
    "docs/operations.md#what-became-of-a-message-that-no-worker-could-read",
    "never the content, nor with --json",
)
def test_list_has_a_line_for_each_message_oldest_first_and_never_its_content(redis: Redis, keye: Keye) -> None:
    old = put(redis, b"https://bucket/?X-Amz-Signature=secret", seconds_ago=2 * HOUR)
    new = put(redis, b"s" * 200_000, reason="its body is no base64", job_id="job-7")
    code, listed = keye("dead", "list", "--messages")
    first, second = listed.splitlines()
    assert code == ExitCode.OK
    assert first.split()[0] == old
    assert first.endswith("38 bytes  it is no JSON")
    assert time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(int(old.split("-")[0]) / 1000)) in first
    assert second.split()[0] == new
    assert second.endswith("200,000 bytes  its body is no base64  (job job-7)")

    code, as_json = keye("dead", "list", "--messages", "--json", "--since", "1h")
    (fact,) = map(json.loads, as_json.splitlines())
    assert fact["message_id"] == new
    assert (fact["size"], fact["reason"], fact["worker"]) == (200_000, "its body is no base64", "gpu-1:7")
    assert fact["job_id"] == "job-7"
    assert abs(fact["quarantined_at"] - time.time()) < HOUR
    assert "secret" not in listed + keye("dead", "list", "--messages", "--json")[1]


def test_list_goes_on_behind_what_fits_into_a_round_trip(redis: Redis, keye: Keye, client: Client) -> None:
    ids = [put(redis, b"?", seconds_ago=200 - number) for number in range(150)]
    assert [line.split()[0] for line in keye("dead", "list", "--messages")[1].splitlines()] == ids
    assert [message.message_id for message in client.quarantine.select(since_seconds=100.5)] == ids[100:]


def test_show_tells_why_and_what_lay_in_the_queue(redis: Redis, keye: Keye) -> None:
    raw = '{"question": "Was ist das für ein Bild, 图片?", "odd": "'.encode() + b"\xff\x00"
    message_id = put(redis, raw, job_id="job-7")
    code, shown = keye("dead", "show", message_id, "--messages")
    assert code == ExitCode.OK
    assert "it is no JSON  (job job-7)" in shown
    assert "gpu-1:7" in shown
    assert '\n{"question": "Was ist das für ein Bild, 图片?", "odd": "\\xff\\x00\n' in shown
    assert "cut here" not in shown
    fact = json.loads(keye("dead", "show", message_id, "--messages", "--json")[1])
    assert b64decode(fact["raw_base64"]) == raw
    assert fact["text"].startswith('{"question": "Was ist das für')
    assert (fact["is_cut"], fact["reason"], fact["message_id"]) == (False, "it is no JSON", message_id)


@pytest.mark.holds(
    "docs/operations.md#what-became-of-a-message-that-no-worker-could-read",
    "the message, and where it is cut; --json has its exact bytes",
)
def test_show_says_where_a_long_message_is_cut(redis: Redis, keye: Keye) -> None:
    message_id = put(redis, b"a" * MAX_KEPT_BYTES + b"b" * 1000)
    shown = keye("dead", "show", message_id, "--messages")[1].splitlines()
    assert shown[-2] == "a" * MAX_KEPT_BYTES
    assert shown[-1] == "... cut here: these are the first 65,536 bytes, 1,000 more were not kept"
    assert json.loads(keye("dead", "show", message_id, "--messages", "--json")[1])["is_cut"]


@pytest.mark.holds(
    "docs/operations.md#what-became-of-a-message-that-no-worker-could-read",
    "Control characters are printed as",
)
@pytest.mark.parametrize(
    "evil",
    [
        "\x1b[2J\x1b]0;title\x07 cleared",
        "a\n1732590000000-0  2025-11-26 03:00:00  9 bytes  forged\r\x85\v\f\u2028\u2029line",
        "\x9b2J \x7f\x08\x08 \u202e turned \u200b \u2066 \ufeff",
    ],
)
def test_nothing_in_a_message_moves_the_cursor_or_forges_a_line(redis: Redis, keye: Keye, evil: str) -> None:
    message_id = put(redis, evil.encode() + b"\x9b\x1b\xed\xa0\x80", reason=f"because {evil}", job_id=evil)
    listed = keye("dead", "list", "--messages")[1]
    shown = keye("dead", "show", message_id, "--messages")[1]
    assert (listed.count("\n"), shown.count("\n")) == (1, 3)
    for arguments in (("list", "--messages", "--json"), ("show", message_id, "--json"), ("show", evil)):
        assert is_plain(keye("dead", *arguments)[1])
    assert is_plain(listed)
    assert is_plain(shown)


def test_pasted_id_is_found_without_saying_what_it_is_of(redis: Redis, keye: Keye, client: Client) -> None:
    failed, message_id, other = fail(redis, client), put(redis, b"lost"), put(redis, b"other")
    assert "lost" in keye("dead", "show", message_id)[1]
    assert "INTERNAL" in keye("dead", "show", failed)[1]
    assert keye("dead", "purge", message_id, failed) == (ExitCode.OK, f"{message_id}\n{failed}\n")
    assert keye("dead", "list") == (ExitCode.OK, "")
    assert [line.split()[0] for line in keye("dead", "list", "--messages")[1].splitlines()] == [other]


def test_unknown_id_ends_with_5_and_nothing_is_purged(redis: Redis, keye: Keye, client: Client) -> None:
    message_id = put(redis, b"?")
    milliseconds = message_id.split("-")[0]
    for unknown in ("1-1", "-", "+", milliseconds, f"({message_id}", f"0{message_id}", f"{'9' * 30}-0", "a b", "$"):
        code, told = keye("dead", "show", "--messages", "--", unknown)
        assert code == ExitCode.NOT_FOUND == 5, unknown
        assert told.startswith("There is no message")
        assert keye("dead", "purge", "--messages", "--", message_id, unknown)[0] == ExitCode.NOT_FOUND
        assert keye("dead", "purge", "--", message_id, unknown)[0] == ExitCode.NOT_FOUND
        with pytest.raises(MessageNotFound, match="in quarantine"):
            client.quarantine.find(unknown)
    assert client.quarantine.find(message_id).raw == b"?"


@pytest.mark.holds("docs/alerts.md#keyequarantinegrows", "`keye dead purge --messages --all` once you have looked")
@pytest.mark.holds(
    "docs/operations.md#what-became-of-a-message-that-no-worker-could-read",
    "or --messages with --since 2h or --all",
)
def test_only_messages_are_purged_by_messages_and_only_letters_without(
    redis: Redis, keye: Keye, client: Client
) -> None:
    failed = fail(redis, client)
    older, old, new, newest = (put(redis, b"?", seconds_ago=ago) for ago in (3 * HOUR, 2 * HOUR, 60, 0))
    assert keye("dead", "purge", "--messages", failed)[0] == ExitCode.NOT_FOUND
    assert keye("dead", "purge", "--messages", old) == (ExitCode.OK, f"{old}\n")
    assert keye("dead", "purge", "--messages", "--since", "1h", "--yes") == (ExitCode.OK, f"{new}\n{newest}\n")
    assert keye("dead", "purge", "--all", "--yes") == (ExitCode.OK, f"{failed}\n")
    assert [message.message_id for message in client.quarantine.select()] == [older]
    failed = fail(redis, client)
    assert keye("dead", "purge", "--messages", "--all", "--yes") == (ExitCode.OK, f"{older}\n")
    assert keye("dead", "list", "--messages") == (ExitCode.OK, "")
    assert client.dead_letters.find(failed).job_id == failed


@pytest.mark.parametrize(
    "arguments",
    [
        ("list", "--messages", "--code", "INTERNAL"),
        ("purge", "--messages", "--code", "INTERNAL"),
        ("purge", "--messages"),
        ("purge", "--messages", "--all", "1-1"),
        ("purge", "--messages", "--all", "--since", "1h"),
    ],
)
def test_choice_that_makes_no_sense_is_a_wrong_argument(keye: Keye, arguments: tuple[str, ...]) -> None:
    assert keye("dead", *arguments)[0] == ExitCode.INVALID == 2


@pytest.mark.holds(
    "docs/operations.md#what-became-of-a-message-that-no-worker-could-read",
    "in the last line of `keye verify`",
)
@pytest.mark.holds(
    "docs/operations.md#is-any-job-stuck-lost-or-in-two-places",
    "Messages in quarantine are counted beside, and are no fault of a job.",
)
def test_verify_counts_the_quarantine_and_is_content_with_it(redis: Redis, keye: Keye) -> None:
    code, told = keye("verify")
    assert code == ExitCode.OK
    assert told.endswith(", 0 messages in quarantine\n")
    for _ in range(3):
        put(redis, b"?")
    code, told = keye("verify")
    assert code == ExitCode.OK
    assert told.endswith("0 irregularities, 3 messages in quarantine (keye dead list --messages)\n")


def test_verify_outlives_whatever_lies_in_the_queue(redis: Redis, keye: Keye, client: Client) -> None:
    waiting, held = client.submit(prompt="?"), client.submit(prompt="?")
    held_message, _ = redis.lrange(message_list(Priority.NORMAL), 0, -1)
    redis.lrem(message_list(Priority.NORMAL), 1, held_message)
    for name in message_lists():
        redis.lpush(name, *NO_MESSAGES)
    redis.hset(UNACKED, "held", json.dumps([json.loads(held_message), "", QUEUE]))
    redis.hset(UNACKED, b"\xff tag", b"\xff")
    for number, raw in enumerate(NO_MESSAGES):
        redis.hset(UNACKED, f"raw {number}", raw)
        redis.hset(UNACKED, f"wrapped {number}", b'[%b, "", "%b"]' % (raw, QUEUE.encode()))

    code, told = keye("verify")
    assert code == ExitCode.IRREGULAR
    irregularity, counts = told.splitlines()
    assert irregularity.startswith("-  a message in keye.jobs names no job or cannot be read")
    assert "Workers put it into quarantine (keye dead list --messages)" in irregularity
    assert counts.startswith("2 jobs (2 QUEUED), 1 irregularities")
    assert client.verify()[0].messages == {None, waiting.id, held.id}


def test_verify_does_not_fetch_what_is_too_large_for_any_worker(redis: Redis, client: Client) -> None:
    jobs = [client.submit(prompt="?") for _ in range(5)]
    huge = b'{"headers": {"id": "huge"}, "body": "' + b"A" * 48 * 2**20 + b'"}'
    redis.lpush(message_list(Priority.NORMAL), huge)
    redis.rpush(message_list(Priority.NORMAL), huge)
    redis.hset(UNACKED, "huge", huge)
    before = redis.info("stats")["total_net_output_bytes"]
    ledger, found = client.verify()
    assert redis.info("stats")["total_net_output_bytes"] - before < 2**20
    assert ledger.messages == {None, *(job.id for job in jobs)}
    assert [irregularity.job_id for irregularity in found] == ["-"]


@pytest.mark.parametrize("step", range(10))
def test_verify_sees_jobs_of_every_priority_that_celery_knows(redis: Redis, client: Client, step: int) -> None:
    job = client.submit(prompt="?")
    redis.zrem(keys.queued("normal"), job.id)
    redis.rename(message_list(Priority.NORMAL), f"{QUEUE}\x06\x16{step}" if step else f"{QUEUE}")
    assert client.verify()[1] == []


def test_verify_knows_the_job_of_a_message_of_celerys_first_protocol(redis: Redis, client: Client) -> None:
    redis.lpush(QUEUE, '{"body": "", "headers": {}, "properties": {"correlation_id": "job-7"}}')
    ledger, found = client.verify()
    assert (ledger.messages, found) == ({"job-7"}, [])


def test_verify_reads_every_message_of_a_long_queue(redis: Redis, client: Client) -> None:
    ids = {f"job-{number}" for number in range(5000)}
    redis.lpush(QUEUE, *(f'{{"headers": {{"id": "{job_id}"}}}}' for job_id in ids))
    assert client.verify()[0].messages == ids
