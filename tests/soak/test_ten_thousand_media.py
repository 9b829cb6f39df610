"""Many media through a busy worker that is killed while callers cancel and its cache is too small: each answer is about
the very bytes whose digest its result tells.

Names are few, so that what lies under one is replaced while jobs that name it wait.
"""

import base64
import hashlib
import io
import itertools
import os
import random
from collections import Counter
from pathlib import Path

import boto3
import pytest

from keye.config.job import ImagePart
from keye.config.outcome import JobFailure, JobResult
from keye.producer import Client, Job
from tests.acceptance.conftest import Start
from tests.soak.numbered_worker import draw
from tests.support.scale import SCALE

WORKER = ("celery", "-A", "tests.soak.numbered_worker", "worker", "--pool", "threads", "--loglevel", "WARNING")
NUM_NAMES = 400
CACHE_BYTES = 64 * 2**10
MEDIA_A_JOB = (1, 2, 3)
MEDIA_A_ROUND = 120
ROUNDS_A_KILL = 5


class Media:
    """Draws numbers and puts each where a worker finds it: on S3, in the job itself, or below a media root."""

    def __init__(self, endpoint: str, folder: Path) -> None:
        self._s3 = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
        self._s3.create_bucket(Bucket="numbers")
        self._folder = folder
        self.number_of: dict[str, int] = {}

    def put(self, number: int) -> ImagePart:
        file = io.BytesIO()
        draw(number).save(file, "PNG")
        content, name = file.getvalue(), f"{number % NUM_NAMES}.png"
        self.number_of[hashlib.sha256(content).hexdigest()] = number
        match number % 5:
            case 0:
                return ImagePart(uri=f"data:image/png;base64,{base64.b64encode(content).decode()}")
            case 1:
                written = self._folder / f"{name}.part"
                written.write_bytes(content)
                written.rename(self._folder / name)
                return ImagePart(uri=str(self._folder / name), digest=True)
            case _:
                self._s3.put_object(Bucket="numbers", Key=name, Body=content)
                return ImagePart(uri=f"s3://numbers/{name}")


@pytest.mark.timeout(1800)
@pytest.mark.holds(
    "docs/operations.md#was-that-really-what-the-model-saw", "10,000 pictures, each with a number of its own"
)
def test_no_answer_is_about_other_pixels_than_its_digest(
    start: Start, client: Client, s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    root = tmp_path / "media"
    root.mkdir()
    settings = {
        "KEYE_S3_ENDPOINT_URL": s3_endpoint,
        "KEYE_MEDIA_ROOTS": str(root),
        "KEYE_CACHE_FOLDER": str(tmp_path / "cache"),
        "KEYE_CACHE_BYTES": str(CACHE_BYTES),
        "KEYE_LEASE_SECONDS": "3",
        "KEYE_DECODERS": "2",
    }
    media, chance = Media(s3_endpoint, root), random.Random(19)
    numbers = iter(range(SCALE.num_media))
    worker = start(*WORKER, **settings)
    worker.wait_until_ready()
    ends: Counter[str] = Counter()
    wrong: list[tuple[str, str]] = []
    attempts: Counter[int] = Counter()
    seen: set[str] = set()

    def take(jobs: list[Job]) -> None:
        for job, end in client.results(jobs, timeout=300):
            ends[end.state if isinstance(end, JobResult | JobFailure) else repr(end)] += 1
            if isinstance(end, JobResult):
                attempts[end.attempts] += 1
                digests = [medium.sha256 or "" for medium in end.media]
                seen.update(digests)
                if end.answer != " ".join(str(media.number_of[digest]) for digest in digests):
                    wrong.append((str(job.id), end.answer))
            elif isinstance(end, JobFailure) and end.state != "CANCELLED":
                ends[end.message] += 1

    before: list[Job] = []
    for round_number in itertools.count(1):
        parts = [media.put(number) for number in itertools.islice(numbers, MEDIA_A_ROUND)]
        if not parts:
            break
        jobs = []
        while parts:
            size = chance.choice(MEDIA_A_JOB)
            jobs.append(client.submit(prompt="which numbers?", media=parts[:size], max_attempts=10))
            del parts[:size]
            if chance.random() < 0.1:
                jobs[-1].cancel()
        if round_number % ROUNDS_A_KILL == 2:
            worker.process.kill()
            worker.process.wait()
            worker = start(*WORKER, **settings)
        take(before)
        before = jobs
    take(before)
    print(f"\n{SCALE.num_media} media, {len(seen)} digests seen, {dict(ends)}, attempts {dict(attempts)}")
    assert wrong == []
    assert set(ends) <= {"SUCCEEDED", "CANCELLED"}
    assert ends["CANCELLED"]
    assert max(attempts) > 1
    assert len(seen) > SCALE.num_media * 0.8
    assert 0 < sum(each.stat().st_size for each in os.scandir(tmp_path / "cache" / "whole")) <= CACHE_BYTES
