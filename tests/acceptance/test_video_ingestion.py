"""examples/video_ingestion beside a real store, queue and worker: whatever ends it, the table comes out right."""

import json
import os
import runpy
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import boto3
import pytest
from redis import Redis

from keye.config import keys
from keye.producer import Client, JobState
from tests.acceptance.conftest import ECHO, Start
from tests.support.checkout import ROOT
from tests.support.conditions import eventually
from tests.support.zoo import Zoo

if TYPE_CHECKING:
    from types_boto3_s3.service_resource import Bucket

PROGRAM = ROOT / "examples" / "video_ingestion" / "ingest.py"
# As the program, but it looks around twice a second.
HASTY = (
    "import sys; sys.path.insert(0, sys.argv[1]); import ingest; ingest.ROUND_SECONDS = 0.5; ingest.main(*sys.argv[2:])"
)

Row = dict[str, Any]

pytestmark = pytest.mark.usefixtures("s3_credentials")


@pytest.fixture
def bucket(s3_endpoint: str) -> "Bucket":
    """An empty one of the test's own."""
    return boto3.session.Session().resource("s3", endpoint_url=s3_endpoint).create_bucket(Bucket=f"b{uuid4()}")


Ingest = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def ingest(bucket: "Bucket", s3_endpoint: str, redis_url: str, tmp_path: Path) -> Iterator[Ingest]:
    started: list[subprocess.Popen[bytes]] = []

    def run(*program: str, **settings: str) -> subprocess.Popen[bytes]:
        environ = os.environ | {"KEYE_REDIS_URL": redis_url, "KEYE_S3_ENDPOINT_URL": s3_endpoint} | settings
        arguments = (f"s3://{bucket.name}/cameras/", str(tmp_path / "videos.db"))
        started.append(subprocess.Popen([sys.executable, *program, *arguments], env=environ))
        return started[-1]

    yield run
    for each in started:
        each.kill()
        each.wait()


def rows(folder: Path) -> list[Row]:
    with closing(sqlite3.connect(folder / "videos.db")) as db:
        db.row_factory = sqlite3.Row
        return [dict(row) for row in db.execute("select * from videos order by uri")]


def states(folder: Path) -> Counter[str]:
    try:
        return Counter(row["state"] for row in rows(folder))
    except sqlite3.OperationalError:
        return Counter()  # No table yet.


def job_ids(redis: Redis) -> set[str]:
    prefix = keys.record("")
    return {name.removeprefix(prefix) for name in redis.scan_iter(f"{prefix}*", _type="hash")}


@pytest.mark.holds("docs/collect-many-results.md#after-a-restart", "`examples/video_ingestion` does so")
def test_no_object_is_lost_or_asked_about_twice_however_often_it_is_killed(
    ingest: Ingest, start: Start, bucket: "Bucket", redis: Redis, zoo: Zoo, s3_endpoint: str, tmp_path: Path
) -> None:
    clip = zoo["h264_one_frame.mp4"].read_bytes()
    for number in range(6):
        bucket.put_object(Key=f"cameras/{number}.mp4", Body=clip)
    ingestion = ingest(str(PROGRAM))
    eventually(lambda: states(tmp_path) == {"QUEUED": 6})
    ingestion.kill()
    ingestion.wait()

    # What is left of a kill between sending jobs and writing that down.
    with closing(sqlite3.connect(tmp_path / "videos.db")) as db, db:
        db.execute("update videos set state = 'LISTED', job_id = null where rowid > 3")
    for number in range(6, 12):
        bucket.put_object(Key=f"cameras/{number}.mp4", Body=clip)
    ingestion = ingest(str(PROGRAM))
    eventually(lambda: states(tmp_path) == {"QUEUED": 12})
    start(*ECHO, KEYE_CONCURRENCY="1", KEYE_S3_ENDPOINT_URL=s3_endpoint).wait_until_ready()
    eventually(lambda: states(tmp_path)["SUCCEEDED"])
    ingestion.kill()
    ingestion.wait()

    ingest(str(PROGRAM))
    eventually(lambda: states(tmp_path) == {"SUCCEEDED": 12}, within_seconds=60)
    assert [row["uri"] for row in rows(tmp_path)] == sorted(
        f"s3://{bucket.name}/cameras/{number}.mp4" for number in range(12)
    )
    assert job_ids(redis) == {row["job_id"] for row in rows(tmp_path)}
    for row in rows(tmp_path):
        asked = json.loads(redis.hget(keys.record(row["job_id"]), "sealed"))["job"]
        assert [medium["uri"] for medium in asked["media"]] == [row["uri"]]
        assert f"CAPTION: {row['caption']}\nTAGS: {row['tags']}" in asked["prompt"], "the worker echoes"


def test_what_has_no_caption_says_why_and_what_is_written_anew_is_asked_about_anew(
    ingest: Ingest, start: Start, bucket: "Bucket", zoo: Zoo, s3_endpoint: str, tmp_path: Path
) -> None:
    start(*ECHO, KEYE_S3_ENDPOINT_URL=s3_endpoint).wait_until_ready()
    for name, content in (("broken.mp4", b"no video"), ("notes.txt", b"no video"), ("other/clip.mp4", b"elsewhere")):
        folder = "" if "/" in name else "cameras/"
        bucket.put_object(Key=folder + name, Body=content)
    ingest("-c", HASTY, str(PROGRAM.parent))
    eventually(lambda: states(tmp_path) == {"FAILED": 1, "REFUSED": 1})
    broken, notes = rows(tmp_path)
    assert (broken["code"], notes["code"]) == ("MEDIA_UNSUPPORTED", "InvalidJob")

    clip = zoo["h264_one_frame.mp4"].read_bytes()
    bucket.put_object(Key="cameras/broken.mp4", Body=clip)
    eventually(lambda: states(tmp_path) == {"SUCCEEDED": 1, "REFUSED": 1})
    assert rows(tmp_path)[0]["code"] is None
    assert rows(tmp_path)[0]["job_id"] != broken["job_id"]


def test_a_full_queue_is_waited_out(
    ingest: Ingest, start: Start, bucket: "Bucket", client: Client, zoo: Zoo, s3_endpoint: str, tmp_path: Path
) -> None:
    start(*ECHO, KEYE_CONCURRENCY="1", KEYE_S3_ENDPOINT_URL=s3_endpoint).wait_until_ready()
    # How fast a queue empties is told by the jobs that end.
    for job in [client.submit(prompt="hello") for _ in range(3)]:
        job.result(timeout=60)
    first = client.submit(prompt=f"write {tmp_path / 'over'}")
    eventually(lambda: first.state is JobState.RUNNING)
    clip = zoo["h264_one_frame.mp4"].read_bytes()
    for number in range(6):
        bucket.put_object(Key=f"cameras/{number}.mp4", Body=clip)
    ingest("-c", HASTY, str(PROGRAM.parent), KEYE_MAX_QUEUE_DEPTH="3")
    eventually(lambda: states(tmp_path) == {"QUEUED": 3, "LISTED": 3})
    (tmp_path / "over").touch()
    eventually(lambda: states(tmp_path) == {"SUCCEEDED": 6}, within_seconds=100)


@pytest.mark.parametrize(
    ("answer", "caption", "tags"),
    [
        ("CAPTION: A man waves.\nTAGS: man, street", "A man waves.", "man, street"),
        ("**Caption:** A man waves.\n\n**Tags:** Man, street, man.", "A man waves.", "man, street"),
        ("caption：有人在招手\ntags：人，街道", "有人在招手", "人, 街道"),  # noqa: RUF001
        ("A man waves.", "A man waves.", ""),
        ("", "", ""),
    ],
)
def test_answers_are_read_that_do_not_keep_to_the_form(answer: str, caption: str, tags: str) -> None:
    assert runpy.run_path(str(PROGRAM))["read_answer"](answer) == (caption, tags)
