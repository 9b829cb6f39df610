"""What a batch leaves in Redis of the jobs that it has written down."""

import json
from pathlib import Path

import pytest
from redis import Redis

from keye import Client
from keye.config import keys
from keye.config.topology import result_key
from keye.producer.transport import RELEASED_SECONDS
from tests.acceptance.conftest import ECHO, Start
from tests.support.conditions import eventually

OWN_SECONDS = 5000


@pytest.mark.holds(
    "docs/batches.md#what-if-something-dies",
    "An answer that is written down is kept in Redis for ten more minutes",
    "Jobs with a `result_ttl_seconds` or an",
)
@pytest.mark.parametrize("is_gone_on_with", [False, True])
def test_answers_that_are_written_down_go_soon_and_all_else_stays_as_long_as_it_would(
    start: Start, client: Client, redis: Redis, tmp_path: Path, is_gone_on_with: bool
) -> None:
    (tmp_path / "in.jsonl").write_text(
        "".join(
            json.dumps(line) + "\n"
            for line in (
                {"custom_id": "plain", "prompt": "hello"},
                {"custom_id": "own", "prompt": "hello", "result_ttl_seconds": OWN_SECONDS},
                {"custom_id": "failed", "prompt": "?", "media": ["/nowhere.png"]},
                {"custom_id": "joined", "prompt": "key", "idempotency_key": "somebody's"},
            )
        )
    )
    somebody = client.submit(prompt="key", priority="low", idempotency_key="somebody's")
    if is_gone_on_with:
        before = client.submit_batch(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
        eventually(lambda: before.progress.in_flight == 4)
        before.stop()
    start(*ECHO).wait_until_ready()
    ended = client.submit_batch(tmp_path / "in.jsonl", output := tmp_path / "out.jsonl").wait(120)
    assert (ended.answered, ended.failed) == (3, 1)
    answers = {line["custom_id"]: line["job_id"] for line in map(json.loads, output.read_text().splitlines())}
    (failure,) = map(json.loads, (tmp_path / "out.errors.jsonl").read_text().splitlines())
    assert answers["joined"] == somebody.id

    def lives(job_id: str) -> list[int]:
        return [redis.ttl(name) for name in (keys.record(job_id), keys.events(job_id), result_key(job_id))]

    assert all(0 < seconds <= RELEASED_SECONDS for seconds in lives(answers["plain"]))
    assert all(RELEASED_SECONDS < seconds <= OWN_SECONDS for seconds in lives(answers["own"]))
    assert all(seconds > RELEASED_SECONDS for seconds in [*lives(somebody.id), *lives(failure["job_id"])])
