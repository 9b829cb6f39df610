"""Workers die under jobs that only wait: for a store, a decoder or room in the engine. They pay nothing for it."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event, Thread

import boto3
import pytest
from PIL import Image

from keye.config import keys
from keye.producer import Client, Job
from tests.chaos.broker import Broker
from tests.chaos.conftest import Gate
from tests.chaos.echo_workers import EchoWorker, EchoWorkers
from tests.chaos.ledger import attempts_of, wait_for_all
from tests.integration.fetch_s3.road import Road
from tests.support.conditions import eventually
from tests.support.decoder_children import children_of

NUM_KILLS = 3

AllIsWell = Callable[[list[Job]], None]


@pytest.fixture
def store_opens(s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Event]]:
    """The address of a store with a picture, which answers once it is open."""
    for name, value in {"ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    Image.new("RGB", (64, 64), "teal").save(tmp_path / "picture.png")
    client = boto3.session.Session().client("s3", endpoint_url=s3_endpoint)
    client.create_bucket(Bucket="media")
    client.upload_file(str(tmp_path / "picture.png"), "media", "picture.png")
    opens = Event()
    with Road(s3_endpoint) as road:
        road.meets = "HEAD"
        road.troubles.appendleft(opens.wait)
        road.troubles.pop()
        thread = Thread(target=road.serve_forever, args=(0.01,))
        thread.start()
        yield road.url, opens
        opens.set()
        road.shutdown()
        thread.join()


@pytest.fixture
def workers(
    broker: Broker, tmp_path: Path, lease_seconds: float, store_opens: tuple[str, Event]
) -> Iterator[EchoWorkers]:
    """With one decoder each, and an engine with room for one."""
    settings = {
        "KEYE_S3_ENDPOINT_URL": store_opens[0],
        "KEYE_MEDIA_ROOTS": str(tmp_path),
        "ECHO_MAX_RUNNING": "1",
        "KEYE_FRAMES_CACHE_BYTES": "0",  # or the second question about a picture would need no decoder
        **{name: value for name, value in os.environ.items() if name.startswith("AWS_")},
    }
    workers = EchoWorkers(broker.url, broker.redis, tmp_path, lease_seconds, **settings)
    yield workers
    workers.end()


@pytest.mark.holds("docs/reliability.md#the-chaos-tests", "SIGKILL of a worker with jobs that wait")
@pytest.mark.holds("docs/reliability.md#promises", "runs again uncounted")
def test_jobs_that_wait_survive_any_death_beside_what_runs(
    broker: Broker,
    client: Client,
    workers: EchoWorkers,
    assert_all_is_well: AllIsWell,
    gate: Gate,
    store_opens: tuple[str, Event],
    tmp_path: Path,
) -> None:
    may_end = tmp_path / "may_end"
    picture = str(tmp_path / "picture.png")

    def occupy(worker: EchoWorker) -> list[Job]:
        """Its engine and its decoder."""
        # Whoever waits for one that is still being started is in none.
        assert client.submit(prompt="hello", media=[picture]).result(60).answer == "hello"
        (decoder,) = children_of(worker.pid)
        jobs = [client.submit(prompt=f"write {may_end}")]
        eventually(lambda: last_event(jobs[0]).find('"text"') > 0)
        os.kill(decoder, signal.SIGSTOP)
        jobs.append(client.submit(prompt="hello", media=[picture]))
        eventually(lambda: last_event(jobs[1]).find('"decode"') > 0)
        return jobs

    def last_event(job: Job) -> str:
        return "".join(event["event"] for _, event in broker.redis.xrevrange(keys.events(job.id), count=1))

    def record(job: Job) -> dict[str, str]:
        return broker.redis.hgetall(keys.record(job.id))

    def waits(job: Job) -> bool:
        found = record(job)
        return (
            found["state"] == "RUNNING"
            and found["worker"] == worker.name
            and (found.get("waits") == found["attempts"] or '"fetch"' in last_event(job))
        )

    def all_wait() -> bool:
        return all(map(waits, waiting))

    # As many as it is to hold: it takes none that is meant for its heir.
    (worker,) = workers.start_ready(KEYE_CONCURRENCY="6")
    running = occupy(worker)
    # More would not be taken while one waits for the engine, and one for the decoder.
    waiting = [client.submit(prompt="hello"), client.submit(prompt="hello", media=[picture])]
    waiting += [client.submit(prompt="hello", media=["s3://media/picture.png"]) for _ in range(2)]
    for _ in range(NUM_KILLS):
        eventually(all_wait, within_seconds=60)
        (heir,) = workers.start_ready(KEYE_CONCURRENCY="6")
        running += occupy(heir)
        worker.kill()
        for job in running[:-2]:
            # Or it would come back and wait among them.
            job.cancel()
        worker = heir
    eventually(all_wait, within_seconds=60)
    spared = [(record(job).get("deaths"), record(job)["spared"]) for job in waiting]
    assert attempts_of(broker.redis, waiting) == [NUM_KILLS + 1] * len(waiting)
    assert spared == [(None, str(NUM_KILLS))] * len(waiting)
    assert [record(job).get("deaths") for job in running] == ["1"] * 2 * NUM_KILLS + [None] * 2
    may_end.touch()
    store_opens[1].set()
    for decoder in children_of(worker.pid):
        os.kill(decoder, signal.SIGCONT)
    wait_for_all(broker.redis, running + waiting, within_seconds=60)
    assert_all_is_well(running[-2:] + waiting)
    assert "to run alone" not in workers.logs
    gate(
        f"SIGKILL of {NUM_KILLS} workers, one after another, under {len(waiting)} jobs that wait",
        f"{len(waiting)} succeed, none alone",
        f"{len(waiting)} succeed, none alone",
    )
