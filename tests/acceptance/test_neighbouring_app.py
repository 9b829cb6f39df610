"""Another Celery application in the database of ours: what the two notice of each other."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from celery import Celery
from redis import Redis

from keye.producer import Client, JobState
from tests.acceptance.conftest import ECHO, Start, Started
from tests.support.conditions import eventually

LEASE_SECONDS = 1
# As many do: acknowledged late, with Celery's visibility timeout of an hour.
SHOP = """
import os, pathlib, time
from celery import Celery

app = Celery("shop", broker=os.environ["KEYE_REDIS_URL"], backend=os.environ["KEYE_REDIS_URL"])
app.conf.update(task_acks_late=True)

@app.task(name="charge")
def charge(folder):
    with open(f"{folder}/charged", "a") as ledger:
        ledger.write("charged\\n")
    while not pathlib.Path(folder, "paid").exists():
        time.sleep(0.05)
    return "paid"
"""


@pytest.fixture
def shop(redis_url: str) -> Iterator[Celery]:
    with Celery("shop", broker=redis_url, backend=redis_url, set_as_current=False) as app:
        yield app
        app.backend.result_consumer.subscribed_to.clear()


@pytest.fixture
def start_shop(start: Start, tmp_path: Path) -> Callable[[], Started]:
    def run() -> Started:
        (tmp_path / "shop.py").write_text(SHOP)
        options = ("--pool", "threads", "--concurrency", "2", "--loglevel", "INFO", "-n", "shop@%h")
        started = start("celery", "-A", "shop", "worker", *options)
        eventually(lambda: " ready." in started.log, within_seconds=60)
        return started

    return run


@pytest.mark.holds(
    "docs/celery.md#share-a-database-with-other-apps",
    "Tasks of other apps run as if our workers were not there",
)
def test_a_long_task_of_another_app_runs_once_beside_ours(
    start: Start, start_shop: Callable[[], Started], shop: Celery, redis: Redis, client: Client, tmp_path: Path
) -> None:
    start_shop()
    start(*ECHO, KEYE_LEASE_SECONDS=str(LEASE_SECONDS)).wait_until_ready()
    task = shop.send_task("charge", [str(tmp_path)])
    ledger = tmp_path / "charged"
    eventually(ledger.exists)
    ((tag, taken_at),) = redis.zrange("unacked_index", 0, -1, withscores=True)
    # By then ours have handed out several times what is theirs.
    eventually(lambda: time.time() > taken_at + 5 * LEASE_SECONDS or redis.zscore("unacked_index", tag) != taken_at)
    job = client.submit(prompt=f"write {tmp_path / 'paid'}")
    eventually(lambda: job.state is JobState.RUNNING)
    (tmp_path / "paid").touch()
    assert task.get(timeout=60) == "paid"
    assert job.result(timeout=60).attempts == 1
    assert ledger.read_text() == "charged\n"


@pytest.mark.holds(
    "docs/celery.md#share-a-database-with-other-apps",
    "what ours have taken and not acknowledged lies in `keye:unacked`",
)
def test_what_ours_have_taken_lies_apart(start: Start, redis: Redis, client: Client) -> None:
    start(*ECHO).wait_until_ready()
    client.submit(prompt="wait 300")
    (held,) = eventually(lambda: redis.hvals("keye:unacked"))
    assert json.loads(held)[2] == "keye.jobs"
    assert redis.zcard("keye:unacked-index") == 1
    assert not redis.exists("unacked", "unacked_index")


@pytest.mark.holds(
    "docs/celery.md#share-a-database-with-other-apps",
    "A remote command without `--destination` is heard by the workers of all of them",
)
def test_remote_commands_of_another_app_change_no_worker_of_ours(
    start: Start, start_shop: Callable[[], Started], shop: Celery, client: Client
) -> None:
    theirs, ours = start_shop(), start(*ECHO)
    ours.wait_until_ready()
    eventually(lambda: len(shop.control.ping(timeout=1)) == 2)
    shop.control.shutdown()
    eventually(lambda: theirs.process.poll() is not None, within_seconds=60)
    eventually(lambda: "the remote command shutdown is refused" in ours.log)
    assert client.submit(prompt="hello").result(timeout=60).answer == "hello"
