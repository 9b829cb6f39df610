"""The commands and programs of docs/batches.md, as printed, beside a real store, queue and worker."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import boto3
import pytest

from keye.producer.shell import ExitCode
from tests.acceptance.conftest import ECHO, PICTURE, Start
from tests.support.checkout import ROOT
from tests.support.pages import printed

OF_A_BUCKET, WITH_A_REPORT = printed("docs/batches.md", language="")
CAPTIONS, PROGRAM = printed("docs/batches.md")
QUESTION = "What is shown?"

pytestmark = pytest.mark.usefixtures("s3_credentials")


def run(command: str, folder: Path, redis_url: str, **settings: str) -> tuple[int, str, str]:
    environ = os.environ | {"KEYE_REDIS_URL": redis_url, **settings}
    keye, *words = shlex.split(command, comments=True)
    command_line = [str(Path(sys.executable).with_name(keye)), *words]
    ended = subprocess.run(command_line, cwd=folder, env=environ, capture_output=True, text=True, timeout=120)
    return ended.returncode, ended.stdout, ended.stderr


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.holds("README.md#ask-a-question", 'keye batch run s3://photos/2026/ "What is shown?" -o captions.jsonl')
@pytest.mark.holds(
    "docs/batches.md#how-do-i-ask-about-a-whole-bucket-or-a-file-of-a-million-questions",
    'keye batch run s3://photos/2026/ "What is shown?" -o captions.jsonl',
    "That asks about every image and video below the prefix",
    "Credentials are found as boto3 finds them",
    "What has no answer goes to `captions.errors.jsonl`, with the reason",
    "The last line counts them, and the exit code is 0 where all were answered, 3 where some failed",
)
@pytest.mark.holds(
    "docs/batches.md#what-can-the-input-be", "what is neither an image nor a video is counted at the end"
)
@pytest.mark.holds("docs/batches.md#what-does-it-write", 'captions = {line["custom_id"]: line["answer"] for line')
@pytest.mark.holds("docs/batches.md#what-if-something-dies", "is in `captions.jsonl.journal`, a SQLite database")
def test_a_bucket_becomes_a_file_of_captions(
    start: Start, s3_endpoint: str, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert OF_A_BUCKET.strip() in (ROOT / "README.md").read_text()
    store = boto3.session.Session().resource("s3", endpoint_url=s3_endpoint)
    bucket = store.create_bucket(Bucket="photos")
    # Other tests have one of this name.
    bucket.objects.all().delete()
    pictures = [f"2026/{number}.png" for number in range(12)]
    for key in (*pictures, "2025/before.png", "2026/notes.txt"):
        bucket.put_object(Key=key, Body=PICTURE)
    bucket.put_object(Key="2026/torn.png", Body=PICTURE[:40])
    start(*ECHO, KEYE_S3_ENDPOINT_URL=s3_endpoint, KEYE_S3_BUCKETS="photos").wait_until_ready()
    code, told, noted = run(OF_A_BUCKET, tmp_path, redis_url, KEYE_S3_ENDPOINT_URL=s3_endpoint)
    assert (code, told) == (
        ExitCode.JOB_FAILED,
        "13 lines: 12 answered (captions.jsonl), 1 failed (captions.errors.jsonl; --retry-failed runs them again)\n",
    )
    assert noted == "1 file passed over, by name neither image nor video\n"
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(CAPTIONS, names)
    assert names["captions"] == dict.fromkeys(pictures, QUESTION)
    (failed,) = read(tmp_path / "captions.errors.jsonl")
    assert (failed["custom_id"], failed["code"]) == ("2026/torn.png", "MEDIA_CORRUPT")
    assert (tmp_path / "captions.jsonl.journal").read_bytes().startswith(b"SQLite format 3")
    bucket.put_object(Key="2026/torn.png", Body=PICTURE)
    again = f"{OF_A_BUCKET} --retry-failed"
    code, told, _ = run(again, tmp_path, redis_url, KEYE_S3_ENDPOINT_URL=s3_endpoint)
    assert (code, told) == (ExitCode.OK, "13 lines: 13 answered (captions.jsonl), 0 failed\n")


@pytest.mark.holds(
    "docs/batches.md#how-do-i-look-at-it",
    'keye batch run ./photos "What is shown?" -o shown.jsonl --report report.html',
)
@pytest.mark.holds("docs/batches.md#from-python", 'batch = client.submit_batch("questions.csv", "answers.jsonl"')
def test_a_folder_becomes_a_page_and_a_table_is_asked_from_python(
    start: Start, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(PICTURE)
    (tmp_path / "questions.csv").write_text('id,image,prompt\nfirst,photos/a.png,"What, then?"\n')
    start(*ECHO).wait_until_ready()
    code, told, noted = run(WITH_A_REPORT, tmp_path, redis_url)
    assert (code, told, noted) == (ExitCode.OK, "1 line: 1 answered (shown.jsonl), 0 failed\n", "")
    page = (tmp_path / "report.html").read_text()
    assert QUESTION in page
    assert "data:image/jpeg;base64," in page
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KEYE_REDIS_URL", redis_url)
    names: dict[str, Any] = {}
    exec(PROGRAM, names)
    assert names["batch"].wait(0)[:3] == (1, 1, 0)
    assert [(line["custom_id"], line["answer"]) for line in read(tmp_path / "answers.jsonl")] == [
        ("first", "What, then?")
    ]
