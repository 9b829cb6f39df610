"""Servers that cannot be used: workers and clients refuse them alike, in one sentence."""

import re
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from redis import Redis

from keye.config.primary import CLUSTER, OLD, REPLICA
from keye.producer import Client, QueueUnavailable
from keye.worker.daemon.exit_codes import ExitCode
from keye.worker.daemon.findings import Severity, as_message
from keye.worker.daemon.preflight import check_broker
from tests.chaos.echo_workers import EchoWorkers
from tests.support.conditions import eventually
from tests.support.ports import free_port
from tests.support.redis_login import log_in
from tests.support.redis_server import RedisServer


@pytest.fixture
def replica(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path / "primary") as primary, RedisServer(tmp_path / "replica") as replica:
        replica.redis.replicaof("127.0.0.1", primary.port)
        eventually(lambda: replica.redis.info("replication")["master_link_status"] == "up")
        yield replica


def as_cluster() -> tuple[object, ...]:
    # Its other port is by itself one of those that the kernel gives to clients.
    return "--cluster-enabled", "yes", "--cluster-port", free_port()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path / "cluster", *as_cluster()) as cluster:
        yield cluster


@contextmanager
def pretended(hello: bytes) -> Iterator[str]:
    """The URL of a server that answers HELLO so, and all else as they do: none older than 6.2 can be installed here."""
    replies = {b"HELLO": hello, b"PING": b"+PONG\r\n"}

    class Connection(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            while said := self.request.recv(4096):
                for command in re.findall(rb"\*\d+\r\n\$\d+\r\n(\w+)", said):
                    self.request.sendall(replies.get(command, b"+OK\r\n"))

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Connection) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield f"redis://127.0.0.1:{server.server_address[1]}/0"
        server.shutdown()
        thread.join()


def refused(url: str, sentence: str) -> None:
    (finding,) = check_broker(url, 30, False)
    assert finding.severity is Severity.FAULT
    for part in sentence.partition(". ")[::2]:
        assert part in as_message([finding])
    with Client(url) as client:
        with pytest.raises(QueueUnavailable) as told:
            client.submit(prompt="?")
        assert str(told.value) == f"Redis could not queue the job. {sentence}"
        (refusal,) = client.submit_many([{"prompt": "?"}])
        assert sentence in str(refusal.error)
        for use in (client.status, lambda: client.find("7"), lambda: list(client.dead_letters.select())):
            with pytest.raises(QueueUnavailable) as told:
                use()
            assert str(told.value).endswith(f". {sentence}")


@pytest.mark.holds("docs/operations.md#what-must-be-true-of-redis", "an older one, a replica or a Cluster is refused")
@pytest.mark.parametrize("protocol", ["2", "3"])
class TestFromTheBeginning:
    def test_a_replica(self, replica: RedisServer, protocol: str) -> None:
        url = f"{replica.url}?protocol={protocol}"
        refused(url, REPLICA)
        with Client(url) as client:
            with pytest.raises(QueueUnavailable):
                client.submit(prompt="?")
            replica.redis.replicaof("NO", "ONE")
            assert client.submit(prompt="?").state == "QUEUED"

    def test_a_cluster(self, cluster: RedisServer, protocol: str) -> None:
        refused(f"{cluster.url}?protocol={protocol}", CLUSTER)

    def test_an_old_server(self, protocol: str) -> None:
        reply, version = {
            "3": (b"%3\r\n+version\r\n+6.0.16\r\n+mode\r\n+standalone\r\n+proto\r\n:3\r\n", "6.0.16"),
            "2": (b"-ERR wrong number of arguments for 'hello' command\r\n", "it does not know HELLO"),
        }[protocol]
        with pretended(reply) as url:
            refused(f"{url}?protocol={protocol}", OLD.format(version=version))

    def test_a_very_old_server(self, protocol: str) -> None:
        with pretended(b"-ERR unknown command `HELLO`, with args beginning with: `3`, \r\n") as url:
            refused(f"{url}?protocol={protocol}", OLD.format(version="it does not know HELLO"))


def test_a_worker_that_celery_starts_ends_at_a_cluster(cluster: RedisServer, tmp_path: Path) -> None:
    workers = EchoWorkers(cluster.url, cluster.redis, tmp_path, lease_seconds=30)
    try:
        assert workers.start().exit_code(60) == ExitCode.PREFLIGHT_FAILED
    finally:
        workers.end()
    assert CLUSTER in workers.logs


class TestSinceItsRestart:
    def test_a_replica(self, tmp_path: Path) -> None:
        with RedisServer(tmp_path / "redis") as server, Client(server.url) as client:
            job = client.submit(prompt="?")
            server.redis.replicaof("127.0.0.1", 1)
            with pytest.raises(QueueUnavailable) as told:
                job.cancel()
            assert str(told.value) == f"Redis could not cancel the job. {REPLICA}"
            assert job.state == "QUEUED"

    def test_a_cluster(self, tmp_path: Path) -> None:
        with RedisServer(tmp_path / "redis") as server, Client(server.url) as client:
            job = client.submit(prompt="?")
            server.kill()
            (server.folder / "appendonlydir").rename(server.folder / "before")
            server.start(*as_cluster())
            for use in (lambda: client.submit(prompt="?"), lambda: job.progress):
                with pytest.raises(QueueUnavailable) as told:
                    use()
                assert str(told.value).endswith(CLUSTER)


@pytest.mark.parametrize("protocol", ["2", "3"])
def test_a_client_asks_once(redis: Redis, redis_url: str, protocol: str) -> None:
    with Client(f"{redis_url}?protocol={protocol}") as client:
        redis.config_resetstat()
        for _ in range(3):
            client.submit(prompt="?")
        assert redis.info("commandstats")["cmdstat_hello"]["calls"] == 1
        assert redis.info("commandstats")["cmdstat_evalsha"]["calls"] - 3 <= 1


def test_who_may_not_ask_is_served_all_the_same(redis: Redis, redis_url: str) -> None:
    redis.execute_command("ACL", "SETUSER", "shy", "reset", "on", ">secret", "~*", "&*", "+@all", "-hello")
    try:
        with Client(log_in(redis_url, "shy:secret") + "?protocol=2") as client:
            assert client.submit(prompt="?").state == "QUEUED"
    finally:
        redis.execute_command("ACL", "DELUSER", "shy")
