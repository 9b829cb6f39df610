"""A failover behind a fixed address: another server takes over, and old connections stay open to the one before."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import RedisError

from keye.producer import Client
from tests.chaos.conftest import Gate
from tests.chaos.echo_workers import EchoWorkers
from tests.chaos.ledger import assert_each_succeeded_once, assert_nothing_is_left
from tests.support.conditions import eventually
from tests.support.redis_server import RedisServer
from tests.support.silent_proxy import SilentProxy

LEASE_SECONDS = 9
# A server that loads its data does not end a blocking read when its time is over.
GOES_ON_SECONDS = 15.0


@contextmanager
def replica(server: RedisServer) -> Iterator[str]:
    """It knows nothing of what its primary does, and says what it had."""
    server.redis.replicaof("127.0.0.1", 1)
    yield "READONLY"


@contextmanager
def silent_replica(server: RedisServer) -> Iterator[str]:
    server.redis.config_set("replica-serve-stale-data", "no")
    server.redis.replicaof("127.0.0.1", 1)
    yield "MASTERDOWN"


@contextmanager
def loading(server: RedisServer) -> Iterator[str]:
    """For as long as the test takes."""
    server.redis.mset({f"filling:{number}": "" for number in range(20_000)})
    server.redis.config_set("key-load-delay", 1_000)
    server.redis.config_set("loading-process-events-interval-bytes", 1024)

    def reload() -> None:
        with suppress(RedisError):
            server.redis.execute_command("DEBUG", "RELOAD")

    reloading = threading.Thread(target=reload)
    reloading.start()
    yield "LOADING"
    server.kill()
    reloading.join()


@pytest.mark.holds("docs/reliability.md#promises", "A failover is noticed")
@pytest.mark.holds("docs/reliability.md#the-chaos-tests", "a server that lives on as a replica")
@pytest.mark.parametrize("demoted", [replica, silent_replica, loading])
def test_old_clients_and_workers_go_on_at_the_new_server(
    demoted: Callable[[RedisServer], Any], meanwhile: Callable[..., Any], gate: Gate, tmp_path: Path
) -> None:
    old = RedisServer(tmp_path / "old", "--enable-debug-command", "yes")
    with old, RedisServer(tmp_path / "new") as new, SilentProxy(old.port) as proxy:
        new.redis.replicaof("127.0.0.1", old.port)
        eventually(lambda: new.redis.info("replication")["master_link_status"] == "up")
        url = f"redis://127.0.0.1:{proxy.port}/0"
        workers = EchoWorkers(url, old.redis, tmp_path, LEASE_SECONDS)
        try:
            workers.start_ready()
            # One of them only waits from now on.
            with Client(url) as client, Client(url) as waiting:
                before = client.submit(prompt="before")
                assert before.result(20).answer == "before"
                running = [client.submit(prompt="wait 4") for _ in range(2)]
                heard = meanwhile(waiting.find(running[0].id).result, 60)
                ended = meanwhile(next, waiting.watch(timeout=60))
                workers.started[0].wait_until_holding(2)
                old.redis.wait(1, 5000)

                new.redis.replicaof("NO", "ONE")
                with demoted(old) as answer:
                    eventually(lambda: f"errorstat_{answer}" in old.redis.info("errorstats"))
                    proxy.lead_to(new.port)
                    since = time.monotonic()
                    after = eventually(lambda: submitted(client), GOES_ON_SECONDS)
                    assert after.result(GOES_ON_SECONDS).answer == "after"
                    seconds = time.monotonic() - since
                    assert heard.result(GOES_ON_SECONDS).answer == "wait 4"
                    assert ended.result(GOES_ON_SECONDS).id
                    assert running[1].result(GOES_ON_SECONDS).attempts == 1
                what = f"failover behind an address, the old server {demoted.__name__}: the next job ends after"
                gate(what, f"{seconds:.1f} s", f"{GOES_ON_SECONDS:g} s, 0 lost, 0 extra starts")
                assert seconds < GOES_ON_SECONDS
                assert_each_succeeded_once(new.redis, [before, *running, after])
                assert_nothing_is_left(client, new.redis, LEASE_SECONDS)
        finally:
            workers.end()


def submitted(client: Client) -> Any:
    """None where the old server answered."""
    try:
        return client.submit(prompt="after", idempotency_key="after")
    except ConnectionError:
        return None
