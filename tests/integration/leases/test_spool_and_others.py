"""Whatever another user of the host does to the spool: nothing of ours is lost, read out or held up by it."""

import json
import os
import shutil
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from redis import Redis
from redis.exceptions import OutOfMemoryError

from keye.config.connection import Patience
from keye.worker.leases.job_lease import LeaseStore
from keye.worker.results.outbox import Outbox, Spool, Verdict
from keye.worker.results.settlement import Settlement
from tests.support import neighbour
from tests.support.leased_jobs import a_failure, a_job, claim, record
from tests.support.neighbour import needs_root

pytestmark = needs_root


@pytest.fixture
def shared() -> Iterator[Path]:
    with neighbour.shared_folder() as folder:
        yield folder


@pytest.fixture
def spool(client: Redis, shared: Path) -> Spool:
    """Not made yet, as at the first start on a host, and of a name that anybody can tell."""
    return Spool.of(client, shared / "keye-spool")


@pytest.fixture
def verdict(store: LeaseStore) -> Verdict:
    lease = claim(store, a_job())
    return Verdict(lease=lease, outcome=a_failure(lease))


@pytest.fixture
def precious(shared: Path) -> Path:
    """A folder of the worker's user, as a checkpoint is, which the neighbour may not even look into."""
    folder = shared / "precious"
    folder.mkdir(mode=0o700)
    for name in ("config.json", "tokenizer.json", "0123456789abcdef.json", "left.partial"):
        (folder / name).write_text('{"password": "s3cr3t"}')
        os.utime(folder / name, (0, 0))
    return folder


# By another user, with $1 the folder of KEYE_SPOOL_FOLDER, $2 the one in it and $3 a precious one.
FIRST = {
    "a link to a folder of ours": "mkdir $1; ln -s $3 $2",
    "a link above it": "ln -s $3 $1",
    "a pipe": "mkdir -p $2; mkfifo $2/0123456789abcdef.json $2/0123456789abcdef.partial",
    "a device without end": "mkdir -p $2; ln -s /dev/zero $2/0123456789abcdef.json",
    "a link to a file of ours": "mkdir -p $2; ln -s $3/config.json $2/0123456789abcdef.json",
    "a huge file": "mkdir -p $2; truncate -s 1T $2/0123456789abcdef.json",
    "many files": "mkdir -p $2; cd $2; seq -f %016g.json 3000 | xargs touch",
    "a file in its place": "mkdir $1; touch $2",
    "an empty folder": "mkdir $1",
}


@pytest.mark.holds(
    "docs/operations.md#other-users-have-accounts-on-this-host-what-can-they-do",
    "without its spool keeps outcomes in memory",
)
@pytest.mark.parametrize("first", FIRST)
def test_worker_settles_its_jobs_where_another_user_was_first(
    redis: Redis,
    settlement: Settlement,
    spool: Spool,
    verdict: Verdict,
    precious: Path,
    caplog: pytest.LogCaptureFixture,
    first: str,
) -> None:
    before = {path.name: path.read_text() for path in precious.iterdir()}
    neighbour.does(FIRST[first], spool.folder.parent, spool.folder, precious)
    spool.make()
    outbox = Outbox(settlement, spool, Patience())
    assert len(caplog.messages) == 1, "at the start"
    assert "KEYE_SPOOL_FOLDER" in caplog.text
    with ThreadPoolExecutor(1) as reaper:
        for _ in range(3):
            reaper.submit(outbox.deliver).result(timeout=30)
    assert len(caplog.messages) == 2, "and once by who looks for outcomes"
    redis.config_set("maxmemory", 1)
    try:
        with pytest.raises(OutOfMemoryError):
            outbox.settle(verdict.lease, verdict.outcome, patience_seconds=0)
    finally:
        redis.config_set("maxmemory", 0)
    outbox.deliver()
    assert "outcome" in record(redis, verdict.lease.job_id)
    assert {path.name: path.read_text() for path in precious.iterdir()} == before
    assert "s3cr3t" not in caplog.text


@pytest.mark.holds(
    "docs/operations.md#other-users-have-accounts-on-this-host-what-can-they-do",
    "Not write to, or read, what a worker keeps",
)
def test_made_at_the_start_it_is_nobody_elses_to_write_or_look_into(spool: Spool, verdict: Verdict) -> None:
    spool.make()
    spool.keep(verdict)
    assert stat.S_IMODE(spool.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((spool.folder / f"{verdict.lease.token}.json").stat().st_mode) == 0o600
    for script in ("ls $1/", "touch $1/new", "mv $1 $1.gone", "cat $1/*"):
        with pytest.raises(Exception, match="non-zero exit status"):
            neighbour.does(script, spool.folder)
    assert list(spool.waiting()) == [verdict]


def test_outcome_that_another_user_has_written_is_not_read(
    spool: Spool, verdict: Verdict, caplog: pytest.LogCaptureFixture
) -> None:
    """From a time when others could write to the folder."""
    spool.keep(verdict)
    (kept,) = spool.folder.iterdir()
    forged = spool.folder / "0123456789abcdef.json"
    forged.write_bytes(kept.read_bytes())
    os.chown(forged, neighbour.UID, neighbour.UID)
    for _ in range(3):
        assert list(spool.waiting()) == [verdict]
    assert [f"{forged} cannot be read, passed over" in line for line in caplog.messages] == [True]
    assert forged.exists()


def test_file_that_has_another_name_too_is_neither_read_nor_written_to(spool: Spool, verdict: Verdict) -> None:
    spool.make()
    precious = spool.folder.parent / "precious.json"
    precious.write_bytes(verdict.model_dump_json().encode())
    os.link(precious, spool.folder / "0123456789abcdef.json")
    os.link(precious, spool.folder / f"{verdict.lease.token}.partial")
    assert list(spool.waiting()) == []
    os.utime(precious, (0, 0))
    assert spool.keep(verdict)
    assert list(spool.waiting()) == [verdict]
    assert json.loads(precious.read_bytes())["outcome"]["job_id"] == verdict.lease.job_id


def test_folder_that_others_could_write_is_not_used_by_what_they_put_there(
    spool: Spool, verdict: Verdict, precious: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spool.folder.mkdir(parents=True)
    spool.folder.chmod(0o777)
    neighbour.does("mkfifo $1/0123456789abcdef.json; ln -s $2 $1/link.json", spool.folder, precious)
    assert spool.keep(verdict)
    assert list(spool.waiting()) == [verdict]
    assert ["may be written by others (mode 777)" in line for line in caplog.messages] == [True]


def test_folder_that_others_move_away_and_make_anew_harms_no_outcome(
    settlement: Settlement, redis: Redis, client: Redis, shared: Path, verdict: Verdict
) -> None:
    """In a folder that all may write to and that is not sticky, such as a volume that is open to all."""
    (shared / "volume").mkdir()
    (shared / "volume").chmod(0o777)
    spool = Spool.of(client, shared / "volume" / "keye-spool")
    spool.make()
    assert spool.keep(verdict)
    waiting = spool.waiting()
    neighbour.does("mv $1 $1.gone; mkdir -p $2; mkfifo $2/0123456789abcdef.json", spool.folder.parent, spool.folder)
    assert list(spool.waiting()) == []
    assert not spool.keep(verdict)
    shutil.rmtree(spool.folder.parent)
    (shared / "volume" / "keye-spool.gone").rename(spool.folder.parent)
    assert list(waiting) == [verdict]
    Outbox(settlement, spool, Patience()).deliver()
    assert "outcome" in record(redis, verdict.lease.job_id)


def test_file_of_ours_that_is_no_outcome_by_its_name_stays(spool: Spool, caplog: pytest.LogCaptureFixture) -> None:
    spool.make()
    for name in ("config.json", "accounts.json"):
        (spool.folder / name).write_text("{}")
    for _ in range(3):
        assert list(spool.waiting()) == []
    assert sorted(path.name for path in spool.folder.iterdir()) == ["accounts.json", "config.json"]
    assert len(caplog.messages) == 2
