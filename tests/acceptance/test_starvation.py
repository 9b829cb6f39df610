"""What a worker says of an engine that waits for its jobs: a store holds its answers, a decoder stands still."""

import os
import signal
from pathlib import Path

import pytest
from redis import Redis

from keye.config.presence import EngineUse, list_present
from keye.producer import Client
from tests.acceptance.conftest import ECHO, PICTURE, SlowStore, Start
from tests.support.conditions import eventually
from tests.support.decoder_children import children_of

HELD = "s3://bucket/held.png"


def told(redis: Redis) -> EngineUse:
    (present,) = list_present(redis)
    assert present.engine is not None
    return present.engine


def causes(use: EngineUse) -> set[str]:
    """Those that have counted for longer than a job takes on its way through."""
    return {cause for cause, seconds in use.starved_seconds if seconds >= 1}


@pytest.mark.holds(
    "docs/operations.md#the-cpu-is-busy-and-the-gpu-is-not-why",
    "`keye status` says it of each worker",
    "Looked at ten times a second",
)
def test_a_store_that_holds_its_answers_starves_the_engine_until_it_is_full(
    start: Start, redis: Redis, client: Client, slow_store: SlowStore, tmp_path: Path
) -> None:
    worker = start(*ECHO, KEYE_S3_ENDPOINT_URL=slow_store.url, ECHO_MAX_RUNNING="1")
    worker.wait_until_ready()
    held = client.submit(prompt="hello", media=[HELD])
    eventually(lambda: causes(told(redis)) == {"fetch"})
    assert any("s for media" in line for line in client.status().lines())

    may_end = tmp_path / "may_end"
    long = client.submit(prompt=f"write {may_end}")
    full = eventually(lambda: (use := told(redis)).running == 1 and use)
    later = eventually(lambda: (use := told(redis)).seconds >= full.seconds + 2 and use)
    assert later.starved_seconds == full.starved_seconds
    assert causes(later) == {"fetch"}

    may_end.touch()
    slow_store.may_go_on.set()
    assert held.result(timeout=60).answer == "hello"
    long.result(timeout=60)


def test_a_decoder_that_stands_is_what_the_engine_waits_for(
    start: Start, redis: Redis, client: Client, tmp_path: Path
) -> None:
    (tmp_path / "red.png").write_bytes(PICTURE)
    asked = {"prompt": "hello", "media": [str(tmp_path / "red.png")]}
    # What was decoded is not kept: the second question about a picture would need no decoder.
    worker = start(*ECHO, KEYE_DECODERS="1", KEYE_FRAMES_CACHE_BYTES="0")
    pid = worker.wait_until_ready().worker.pid
    client.submit(**asked).result(timeout=60)
    (decoder,) = children_of(pid)
    os.kill(decoder, signal.SIGSTOP)
    jobs = [client.submit(**asked) for _ in range(2)]
    eventually(lambda: causes(told(redis)) == {"decode"})
    assert any("s for decoders" in line for line in client.status().lines())
    os.kill(decoder, signal.SIGCONT)
    for job in jobs:
        job.result(timeout=60)
