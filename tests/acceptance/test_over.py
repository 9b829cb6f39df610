"""What has ended stays so, however long its messages wait: real workers, and all that expires is gone meanwhile."""

import json
from collections import Counter
from pathlib import Path

import pytest
from redis import Redis

from keye.config import keys
from keye.config.codes import JobState
from keye.config.job import Priority
from keye.config.topology import LISTENER, LISTENERS, UNACKED, message_list
from keye.producer import Client
from keye.worker.telemetry.presence import EXPIRY_SECONDS
from tests.acceptance.conftest import ECHO, Start
from tests.acceptance.test_plain_redis import make_job, push, write_record
from tests.support.conditions import eventually
from tests.support.leased_jobs import time_passes

ONE_AT_A_TIME = {"KEYE_CONCURRENCY": "1", "KEYE_LEASE_SECONDS": "1"}


def waiting(redis: Redis) -> list[str]:
    return [raw for priority in Priority for raw in redis.lrange(message_list(priority), 0, -1)]


@pytest.mark.holds(
    "docs/producers.md#from-python",
    "Its outcome stays, and its idempotency key is taken, for as long as its message waits",
)
@pytest.mark.holds("docs/producers.md#from-any-language", "Its header `keye_recorded`, true, says that the record was")
@pytest.mark.holds(
    "docs/reliability.md#promises",
    "What is over stays over.",
    "A job that has ended never runs again",
    "A job that was cancelled or ran out of time in the queue keeps its record",
)
def test_messages_that_come_after_all_of_a_job_is_gone_run_nothing(
    start: Start, redis: Redis, client: Client, tmp_path: Path
) -> None:
    answered, failed = client.submit(prompt="answered"), client.submit(prompt="raise ValueError")
    raw_job = make_job("of a producer in another language")
    write_record(redis, raw_job)
    push(redis, raw_job)
    duplicates = waiting(redis)
    assert len(duplicates) == 3
    worker = start(*ECHO, **ONE_AT_A_TIME)
    worker.wait_until_ready()
    over = [answered, failed, client.job(raw_job["job_id"])]
    for job in over:
        next(client.results([job], timeout=60))
    client.dead_letters.purge(client.dead_letters.find(failed.id))

    go_on = tmp_path / "go"
    busy = client.submit(prompt=f"write {go_on}", priority=Priority.HIGH)
    eventually(lambda: busy.state is JobState.RUNNING)
    asked = [{"prompt": priority, "priority": priority, "idempotency_key": f"of {priority}"} for priority in Priority]
    ended = [client.submit(**each) for each in asked]
    for job in ended:
        job.cancel()
    asked.append({"prompt": "late", "deadline_seconds": 0.2, "idempotency_key": "of the late"})
    ended.append(client.submit(**asked[-1]))
    eventually(lambda: ended[-1].state is JobState.EXPIRED)
    for raw in duplicates:
        redis.lpush(message_list(Priority.NORMAL), raw)

    time_passes(redis)
    assert [client.submit(**each).id for each in asked] == [job.id for job in ended], "a key is free, its message waits"
    go_on.touch()
    eventually(lambda: not waiting(redis) and not redis.exists(UNACKED))

    told = Counter(fields["job_id"] for _, fields in redis.xrange(keys.ENDED))
    assert told == Counter([*(job.id for job in over), *(job.id for job in ended), busy.id]), worker.log
    assert not redis.exists(*(keys.record(job.id) for job in over))
    assert all(f"job {job.id}: not run" in worker.log for job in over), worker.log
    for job, each in zip(ended, asked, strict=True):
        names = (keys.record(job.id), keys.events(job.id), keys.idempotency(each["idempotency_key"]))
        assert all(0 < redis.ttl(name) <= 86400 for name in names)
    assert client.verify()[1] == []
    time_passes(redis)
    again = client.submit(**asked[0])
    assert again.id != ended[0].id
    assert again.result(timeout=60).answer == "high"


def test_dead_worker_leaves_nothing_in_celerys_list_and_a_living_one_nothing_when_it_ends(
    start: Start, redis: Redis
) -> None:
    def noted() -> set[str]:
        return {name.join(LISTENER) for name in redis.zrange(keys.NODES, 0, -1)}

    dying = start(*ECHO, "-n", "dying@host", KEYE_LEASE_SECONDS="1")
    eventually(lambda: redis.smembers(LISTENERS) == noted() == {"dying@host".join(LISTENER)}, within_seconds=60)
    dying.process.kill()
    living = start(*ECHO, "-n", "living@host", KEYE_LEASE_SECONDS="1")
    eventually(lambda: redis.scard(LISTENERS) == 2, within_seconds=60)
    redis.zincrby(keys.NODES, -EXPIRY_SECONDS - 1, "dying@host")
    eventually(lambda: redis.smembers(LISTENERS) == noted() == {"living@host".join(LISTENER)})
    living.ask_to_end()
    living.exit_code()
    assert not redis.exists(LISTENERS, keys.NODES)


def test_message_that_a_dead_worker_had_taken_comes_back_as_one_of_a_job_with_a_record(
    start: Start, redis: Redis, client: Client, tmp_path: Path
) -> None:
    go_on = tmp_path / "go"
    busy = client.submit(prompt=f"write {go_on}", priority=Priority.HIGH)
    start(*ECHO, "-n", "busy@%h", **ONE_AT_A_TIME).wait_until_ready()
    eventually(lambda: busy.state is JobState.RUNNING)
    dying = start(*ECHO, "-n", "dying@%h", **ONE_AT_A_TIME)
    raw_job = make_job(f"write {go_on}")
    push(redis, raw_job, is_recorded=False)
    job_id = raw_job["job_id"]
    eventually(lambda: redis.hget(keys.record(job_id), "state") == JobState.RUNNING, within_seconds=60)
    dying.process.kill()

    def come_back() -> list[dict[str, object]]:
        headers = [json.loads(raw)["headers"] for raw in waiting(redis)]
        return [each for each in headers if each["id"] == job_id]

    # The reaper's, and what kombu gives back.
    eventually(lambda: len(come_back()) == 2)
    assert [each["keye_recorded"] for each in come_back()] == [True, True]
    go_on.touch()
    assert client.job(job_id).result(timeout=60).answer == f"write {go_on}"
