"""Outcomes that a real server refuses for a while: kept on disk, written once it takes them, and only if they count."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import ConnectionError as Unreachable
from redis.exceptions import OutOfMemoryError

from keye.config import keys
from keye.config.codes import JobState
from keye.config.connection import Patience
from keye.config.outcome import JobFailure
from keye.worker.leases.claims import Claimed
from keye.worker.leases.job_lease import LeaseStore
from keye.worker.leases.reaper import Reaper
from keye.worker.results.outbox import Outbox, Spool, Verdict
from keye.worker.results.settlement import Settlement
from keye.worker.telemetry import metrics
from tests.support.conditions import eventually
from tests.support.leased_jobs import a_failure, a_job, claim, counting, ends, events, record


@pytest.fixture
def spool(client: Redis, tmp_path: Path) -> Spool:
    return Spool.of(client, tmp_path)


@pytest.fixture
def outbox(settlement: Settlement, spool: Spool) -> Outbox:
    return Outbox(settlement, spool, Patience())


@contextmanager
def full(redis: Redis) -> Iterator[None]:
    redis.config_set("maxmemory", 1)
    try:
        yield
    finally:
        redis.config_set("maxmemory", 0)


def leave_on_disk(redis: Redis, outbox: Outbox, lease: Claimed, outcome: JobFailure) -> None:
    """As a process does that dies, or gives up, while the server is full."""
    with full(redis), pytest.raises(OutOfMemoryError):
        outbox.settle(lease, outcome, patience_seconds=0)


@pytest.mark.holds("docs/design.md#one-job-walked", "settle (kept on disk while Redis takes nothing)")
def test_outcome_is_on_disk_until_a_full_server_has_room_again(
    store: LeaseStore, outbox: Outbox, spool: Spool, redis: Redis
) -> None:
    lease = claim(store, a_job())
    answers: list[bool] = []
    settling = threading.Thread(target=lambda: answers.append(outbox.settle(lease, a_failure(lease))))
    with full(redis):
        settling.start()
        eventually(lambda: list(spool.waiting()) == [Verdict(lease=lease, outcome=a_failure(lease))])
    settling.join(timeout=10)
    assert answers == [True]
    assert record(redis, lease.job_id)["state"] == JobState.FAILED
    assert list(spool.waiting()) == []


@pytest.mark.holds(
    "docs/reliability.md#promises",
    "What Redis does not take",
)
@pytest.mark.holds("docs/operations.md#redis-was-away-what-must-i-do", "the next one on the same host writes them")
def test_outcome_of_a_dead_process_is_written_by_the_next(
    store: LeaseStore, settlement: Settlement, outbox: Outbox, client: Redis, redis: Redis, tmp_path: Path
) -> None:
    lease = claim(store, a_job())
    leave_on_disk(redis, outbox, lease, a_failure(lease))

    next_one = Outbox(settlement, Spool.of(client, tmp_path), Patience())
    reaper = Reaper(
        LeaseStore(client, 0.3), "next", [next_one.deliver], dead_letter=lambda _: None, expire=lambda _: None
    )
    reaper.start()
    eventually(lambda: "outcome" in record(redis, lease.job_id))
    reaper.stop()
    assert record(redis, lease.job_id)["outcome"] == a_failure(lease).model_dump_json()


@pytest.mark.holds(
    "docs/reliability.md#promises",
    "What Redis does not take",
)
def test_outcome_on_disk_whose_job_went_on_without_it_is_discarded(
    store: LeaseStore, outbox: Outbox, spool: Spool, redis: Redis
) -> None:
    sealed = a_job()
    lease = claim(store, sealed)
    leave_on_disk(redis, outbox, lease, a_failure(lease, "late"))
    store.requeue([lease])
    second = claim(store, sealed, "worker-2")

    outbox.deliver()
    assert record(redis, sealed.job_id)["state"] == JobState.RUNNING
    assert list(spool.waiting()) == []
    assert outbox.settle(second, a_failure(second))


def test_outcome_written_by_two_processes_ends_the_job_once(
    store: LeaseStore, outbox: Outbox, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="keye.worker.results.settlement")
    lease = claim(store, a_job())
    leave_on_disk(redis, outbox, lease, a_failure(lease))
    with counting(failed=1):
        outbox.deliver()
        assert outbox.settle(lease, a_failure(lease)), "its own thread was waiting too"
    assert [event.type for event in events(redis, lease.job_id)].count("ended") == 1
    assert ends(caplog.records, lease.job_id) == ["FAILED"]


def test_an_end_whose_answer_got_lost_on_the_way_is_counted_and_told_once(
    store: LeaseStore,
    settlement: Settlement,
    outbox: Outbox,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", logger="keye.worker.results.settlement")
    in_order, num_asked = settlement._settle, 0

    def lose_first_answer(*asked: Any) -> Any:
        nonlocal num_asked
        num_asked += 1
        answer = in_order(*asked)
        if num_asked == 1:
            raise Unreachable("Connection closed by server.")
        return answer

    monkeypatch.setattr(settlement, "_settle", lose_first_answer)
    lease = claim(store, a_job())
    with counting(failed=1):
        assert outbox.settle(lease, a_failure(lease))
    assert num_asked == 2
    assert ends(caplog.records, lease.job_id) == ["FAILED"]


def test_outcomes_wait_while_the_server_is_away_and_none_is_dropped(
    store: LeaseStore, outbox: Outbox, spool: Spool, redis: Redis
) -> None:
    for lease in [claim(store, a_job()) for _ in range(3)]:
        leave_on_disk(redis, outbox, lease, a_failure(lease))
    with full(redis), pytest.raises(OutOfMemoryError):
        outbox.deliver()
    assert len(list(spool.waiting())) == 3
    outbox.deliver()
    assert redis.zcard(keys.DEAD_LETTERS) == 3


@pytest.mark.holds(
    "docs/operations.md#redis-was-away-what-must-i-do",
    "It finds them by the host, port and database of `KEYE_REDIS_URL`",
)
def test_another_redis_does_not_get_them(client: Redis, outbox: Outbox, store: LeaseStore, tmp_path: Path) -> None:
    lease = claim(store, a_job())
    leave_on_disk(client, outbox, lease, a_failure(lease))
    with Redis.from_url("redis://127.0.0.1:1/0") as other:
        assert list(Spool.of(other, tmp_path).waiting()) == []


@pytest.mark.holds("docs/operations.md#redis-was-away-what-must-i-do", "The folder takes 10,000 results or 256 MiB")
@pytest.mark.parametrize("bounds", [{"max_files": 1}, {"max_bytes": 300}])
def test_full_spool_takes_no_more_and_says_so(
    store: LeaseStore, tmp_path: Path, bounds: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING")
    spool = Spool(tmp_path, **bounds)
    verdicts = [Verdict(lease=lease, outcome=a_failure(lease)) for lease in (claim(store, a_job()) for _ in range(2))]
    assert 150 < len(verdicts[0].model_dump_json()) < 600
    for verdict in verdicts:
        spool.keep(verdict)
    assert len(list(spool.waiting())) <= 1
    assert any(f"job {verdicts[1].lease.job_id}: outcome is kept in memory only" in line for line in caplog.messages)


def test_file_that_holds_no_outcome_is_told_of_and_dropped(
    spool: Spool, store: LeaseStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lease = claim(store, a_job())
    verdict = Verdict(lease=lease, outcome=a_failure(lease))
    spool.keep(verdict)
    (folder,) = tmp_path.iterdir()
    (folder / "0123456789abcdef.json").write_bytes(verdict.model_dump_json().encode()[:100])
    assert list(spool.waiting()) == [verdict]
    assert "is no outcome" in caplog.text
    assert [path.stem for path in folder.iterdir()] == [lease.token]


@pytest.fixture
def no_disk(settlement: Settlement, tmp_path: Path) -> Outbox:
    """One whose folder cannot be made for as long as there is a file in its place."""
    (tmp_path / "spool").touch()
    return Outbox(settlement, Spool(tmp_path / "spool"), Patience())


@pytest.mark.holds("docs/operations.md#redis-was-away-what-must-i-do", "waits in memory until the process ends")
def test_an_outcome_that_no_disk_takes_is_tried_on_after_patience_has_ended(
    store: LeaseStore, no_disk: Outbox, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="keye.worker")
    lease = claim(store, a_job())
    leave_on_disk(redis, no_disk, lease, a_failure(lease))
    assert any("kept in memory only" in line for line in caplog.messages)
    with full(redis), pytest.raises(OutOfMemoryError):
        no_disk.deliver()
    reaper = Reaper(
        LeaseStore(redis, 0.3), "this", [no_disk.deliver], dead_letter=lambda _: None, expire=lambda _: None
    )
    with counting(failed=1):
        reaper.start()
        eventually(lambda: "outcome" in record(redis, lease.job_id))
        reaper.stop()
    assert ends(caplog.records, lease.job_id) == ["FAILED"]
    no_disk.close()
    assert not [each for each in caplog.records if each.levelname == "ERROR"]


@pytest.mark.parametrize("disk", ["mended", "broken"])
def test_what_is_in_memory_when_its_process_ends_goes_on_disk_or_is_told_of_as_lost(
    store: LeaseStore, no_disk: Outbox, redis: Redis, tmp_path: Path, caplog: pytest.LogCaptureFixture, disk: str
) -> None:
    lease = claim(store, a_job())
    leave_on_disk(redis, no_disk, lease, a_failure(lease))
    if disk == "mended":
        (tmp_path / "spool").unlink()
    lost_before = metrics.OUTCOMES_LOST._value.get()
    no_disk.close()
    lost = [each for each in caplog.records if each.levelname == "ERROR"]
    assert len(lost) == metrics.OUTCOMES_LOST._value.get() - lost_before == (disk == "broken")
    if disk == "mended":
        assert [verdict.lease for verdict in Spool(tmp_path / "spool").waiting()] == [lease]
    else:
        assert f"job {lease.job_id}: its outcome is lost, FAILED (INTERNAL): neither" in lost[0].getMessage()
