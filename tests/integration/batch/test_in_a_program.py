"""Batches of a program that goes on: they leave nothing open, and end with their client, which may be closed."""

import gc
import json
import os
import threading
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from keye.config import keys
from keye.config.faults import InvalidBatch
from keye.producer import Client
from keye.producer.batch.batch import Batch
from keye.producer.transport import RELEASED_SECONDS
from tests.integration.batch.conftest import Answering
from tests.support.conditions import eventually

NUM_LINES = 20


def begin(client: Client, folder: Path, **options: Any) -> Batch:
    lines = ({"custom_id": f"c{number}", "prompt": f"say {number}"} for number in range(NUM_LINES))
    folder.mkdir(exist_ok=True)
    (folder / "in.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return client.submit_batch(folder / "in.jsonl", folder / "out.jsonl", **options)


def is_whole(folder: Path) -> bool:
    found = Counter(json.loads(line)["custom_id"] for line in (folder / "out.jsonl").read_text().splitlines())
    return found == Counter(f"c{number}" for number in range(NUM_LINES))


def num_open() -> int:
    """Files, connections and threads."""
    return len(os.listdir("/proc/self/fd")) + threading.active_count()


# A connection and a reader come and go.
FEW = 8


def test_fifty_of_them_leave_no_file_thread_or_connection(client: Client, answering: Answering, tmp_path: Path) -> None:
    begin(client, tmp_path / "first").wait(30)
    before = num_open()
    for number in range(50):
        begin(client, tmp_path / str(number)).wait(30)
    assert num_open() < before + FEW
    assert all(is_whole(tmp_path / str(number)) for number in range(50))


def test_those_that_cannot_be_begun_leave_nothing_open(client: Client, tmp_path: Path) -> None:
    batch = begin(client, tmp_path, max_in_flight=5)
    eventually(lambda: batch.progress.in_flight == 5)
    before = num_open()
    for _ in range(FEW):
        with pytest.raises(InvalidBatch, match="is in use"):
            client.submit_batch(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert num_open() < before + FEW


def test_it_ends_with_its_client_and_another_goes_on(redis_url: str, answering: Answering, tmp_path: Path) -> None:
    answering.pause()
    with Client(redis_url) as client:
        batch = begin(client, tmp_path, max_in_flight=5)
        eventually(lambda: batch.progress.in_flight == 5)
    assert batch.wait(0).in_flight == 5
    answering.go_on()
    with Client(redis_url) as client:
        assert begin(client, tmp_path).wait(30).answered == NUM_LINES
    assert is_whole(tmp_path)
    assert set(answering.times.values()) == {1}


def test_it_goes_on_where_nobody_keeps_its_client(redis_url: str, answering: Answering, tmp_path: Path) -> None:
    batch = begin(Client(redis_url), tmp_path, max_in_flight=5)
    gc.collect()
    assert batch.wait(30).answered == NUM_LINES
    client = weakref.ref(batch._client)
    del batch
    gc.collect()
    assert client() is None


def test_a_forked_child_leaves_it_to_its_parent(client: Client, answering: Answering, tmp_path: Path) -> None:
    answering.pause()
    batch = begin(client, tmp_path, max_in_flight=5)
    eventually(lambda: batch.progress.in_flight == 5)
    if (child := os.fork()) == 0:
        try:
            with pytest.raises(InvalidBatch, match="was forked from the one that runs this batch"):
                batch.wait(30)
            client.close()
            gc.collect()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    answering.go_on()
    assert batch.wait(30).answered == NUM_LINES
    assert is_whole(tmp_path)


def test_what_has_an_idempotency_key_is_there_for_whoever_asks_the_same(
    client: Client, answering: Answering, redis: Redis, tmp_path: Path
) -> None:
    lines = {"prompt": "say a"}, {"prompt": "say b", "idempotency_key": "b"}
    (tmp_path / "in.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    client.submit_batch(tmp_path / "in.jsonl", tmp_path / "out.jsonl").wait(30)
    ids = [json.loads(line)["job_id"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    let_go, kept = (redis.ttl(keys.record(job_id)) for job_id in sorted(ids))
    assert let_go <= RELEASED_SECONDS < kept
