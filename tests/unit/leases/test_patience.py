"""How long and for what the worker waits when Redis is away."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError, RedisError, ResponseError

from keye.config.connection import Patience, connect
from keye.worker.leases.claims import QueuedJob
from keye.worker.leases.job_lease import LeaseStore
from keye.worker.leases.renewal import LeaseRenewal


class Away:
    """Raises each fault in turn, then answers."""

    def __init__(self, *faults: Exception) -> None:
        self.faults = list(faults)

    def __call__(self) -> str:
        if self.faults:
            raise self.faults.pop(0)
        return "answer"


def test_passing_faults_are_waited_out() -> None:
    action = Away(RedisConnectionError("restarting"), OutOfMemoryError("full"), RedisConnectionError("again"))
    assert Patience().wait_out(action, "asking") == "answer"


@pytest.mark.parametrize(
    "reply",
    [
        "LOADING Redis is loading the dataset in memory",
        "READONLY You can't write against a read only replica.",
        "MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist to disk.",
        "NOREPLICAS Not enough good replicas to write.",
        "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.",
        "CLUSTERDOWN The cluster is down",
        "TRYAGAIN Multiple keys request during rehashing of slot",
        "BUSY Redis is busy running a script.",
        "ERR Error running script (call to f_1): @user_script:2: -READONLY You can't write against a replica.",
    ],
)
def test_what_a_server_says_while_it_cannot_serve_is_waited_out(redis: Redis, reply: str) -> None:
    with pytest.raises(RedisError) as caught:
        redis.eval("return redis.error_reply(ARGV[1])", 0, reply)
    assert Patience().wait_out(Away(caught.value), "asking") == "answer"


def test_fault_is_raised_once_patience_ends() -> None:
    action = Away(*[RedisConnectionError("gone")] * 1000)
    with pytest.raises(RedisConnectionError, match="gone"):
        Patience().wait_out(action, "asking", seconds=0.2)


def test_fault_that_will_not_pass_is_raised_at_once() -> None:
    action = Away(ResponseError("WRONGTYPE"), ResponseError("WRONGTYPE"))
    with pytest.raises(ResponseError):
        Patience().wait_out(action, "asking")
    assert len(action.faults) == 1


def test_a_server_that_takes_no_writes_for_now_is_waited_out(redis: Redis) -> None:
    write = redis.register_script("return redis.call('SET', KEYS[1], 'written')")
    redis.config_set("min-replicas-to-write", 1)
    replicas_come_back = threading.Timer(0.3, lambda: redis.config_set("min-replicas-to-write", 0))
    replicas_come_back.start()
    try:
        assert Patience().wait_out(lambda: write(["key"]), "writing") == "OK"
    finally:
        replicas_come_back.join()
    assert redis.get("key") == "written"


def test_a_claim_is_abandoned_once_the_process_has_to_leave() -> None:
    with connect("redis://127.0.0.1:1/0") as nobody, ThreadPoolExecutor() as pool:
        store = LeaseStore(nobody, lease_seconds=30)
        claims = [pool.submit(store.claim, QueuedJob(job_id, {}), "leaving") for job_id in ("first", "second")]
        LeaseRenewal(store).drain()
        for claim in claims:
            with pytest.raises(RedisConnectionError):
                claim.result(timeout=5)
