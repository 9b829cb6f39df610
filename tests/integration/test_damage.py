"""Randomly damaged files through a real worker: it lives, it never hangs, every job ends, its memory stays."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis

from keye.config.faults import JobFailed
from keye.config.job import AnalysisJob, ImagePart, VideoPart
from keye.config.presence import list_present
from keye.producer import Client, Job
from keye.worker.demo.local_worker import LocalWorker
from tests.support.damage import CLIPS, make_good_files, spoil
from tests.support.decoder_children import children_of
from tests.support.scale import SCALE

CHECKPOINT = Path(__file__).parents[1] / "golden" / "preview" / "checkpoint"
NUM_FILES = SCALE.num_damaged_files
SEED = 20260
MAX_GROWTH_BYTES = 64 * 2**20
MAX_DECODER_BYTES = 256 * 2**20

pytestmark = pytest.mark.timeout(60 + 2 * NUM_FILES)


@pytest.fixture
def worker(redis_url: str, tmp_path: Path) -> Iterator[LocalWorker]:
    settings = {
        "KEYE_MODEL_PATH": str(CHECKPOINT),
        "KEYE_MEDIA_ROOTS": str(tmp_path),
        "KEYE_DECODERS": "2",
        "KEYE_DECODE_TIMEOUT_SECONDS": "20",
        "OMP_NUM_THREADS": "2",
    }
    with LocalWorker(redis_url, tmp_path / "worker.log", settings) as worker:
        yield worker


def worker_pid(redis: Redis) -> int:
    (presence,) = list_present(redis)
    return presence.worker.pid


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def answer_all(client: Client, files: list[Path]) -> Counter[str]:
    """How jobs about the files ended, by code."""
    parts = [
        VideoPart(uri=str(path)) if path.suffix in {Path(name).suffix for name in CLIPS} else ImagePart(uri=str(path))
        for path in files
    ]
    jobs = [
        client.submit(AnalysisJob(media=(part,), prompt="what is it?", generation={"max_new_tokens": 1}))
        for part in parts
    ]
    return Counter(how_it_ended(job) for job in jobs)


def how_it_ended(job: Job) -> str:
    try:
        job.result(timeout=60)
    except JobFailed as failed:
        return failed.failure.code
    return "answered"


@pytest.mark.holds("docs/design.md#decisions", "a crash costs one job its medium, not all jobs their worker")
@pytest.mark.holds("docs/operations.md#what-can-a-broken-or-hostile-file-do", "End its own job with an error.")
def test_damaged_files_end_their_jobs_and_nothing_else(
    worker: LocalWorker, redis: Redis, redis_url: str, tmp_path: Path
) -> None:
    files = []
    for name, content in spoil(make_good_files(tmp_path), NUM_FILES, SEED):
        path = tmp_path / name
        path.write_bytes(content)
        files.append(path)
    pid = worker_pid(redis)
    with Client(redis_url) as client:
        half = len(files) // 2
        ends = answer_all(client, files[:half])
        before = resident_bytes(pid)
        ends += answer_all(client, files[half:])
    assert worker_pid(redis) == pid
    # Nothing that blames the worker.
    assert set(ends) <= {"answered", "MEDIA_CORRUPT", "MEDIA_UNSUPPORTED", "MEDIA_TOO_LARGE"}
    assert ends["answered"] > NUM_FILES // 5
    assert ends["MEDIA_CORRUPT"] > NUM_FILES // 10
    assert resident_bytes(pid) - before < MAX_GROWTH_BYTES
    assert all(resident_bytes(child) < MAX_DECODER_BYTES for child in children_of(pid))
    print(f"{dict(ends)}; the worker grew by {(resident_bytes(pid) - before) / 2**20:.1f} MiB")
