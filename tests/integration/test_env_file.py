"""AWS credentials that stand in `.env` only, as `worker.env.example` has them, against a real S3 server."""

import json
import os
from pathlib import Path

import boto3
import pytest
from pydantic import SecretStr
from redis import Redis

from keye.config import keys
from keye.config.aws import load_aws_names
from keye.config.settings import Settings
from keye.config.wire import open_sealed
from keye.producer import Client, upload
from keye.worker.daemon.findings import Severity
from keye.worker.daemon.trials import check_s3
from keye.worker.media.fetch import s3
from keye.worker.media.job_media import MediaCache, MediaLimits, fetch

FILE = """
# Of both sides.
AWS_ACCESS_KEY_ID=of-the-file
export AWS_SECRET_ACCESS_KEY="a # secret"
AWS_DEFAULT_REGION=eu-central-1
"""
NAMES = ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN", "DEFAULT_REGION")


@pytest.fixture(autouse=True)
def env_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory's; elsewhere on this machine nothing is told."""
    for name in NAMES:
        # Not deleted: what is put there is to be taken away again.
        monkeypatch.setenv(f"AWS_{name}", "")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/dev/null")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.chdir(tmp_path)
    path = tmp_path / ".env"
    path.write_text(FILE)
    return path


@pytest.fixture(autouse=True)
def no_clients() -> None:
    """Each side keeps a client for each endpoint."""
    s3._make_client.cache_clear()
    upload._client.cache_clear()


@pytest.fixture
def bucket(s3_endpoint: str) -> str:
    keys = {"aws_access_key_id": "of-who-made-it", "aws_secret_access_key": "x", "region_name": "us-east-1"}
    boto3.session.Session().client("s3", endpoint_url=s3_endpoint, **keys).create_bucket(Bucket="media")
    return "media"


@pytest.mark.holds("docs/operations.md#which-media-does-a-worker-read", "`AWS_*` names may stand in `.env`")
def test_producers_upload_with_them_and_workers_fetch(
    redis: Redis, redis_url: str, s3_endpoint: str, bucket: str, tmp_path: Path
) -> None:
    photo = b"\xff\xd8\xff" + os.urandom(2 * 2**20)
    settings = Settings(redis_url=SecretStr(redis_url), s3_endpoint_url=s3_endpoint, upload_prefix=f"s3://{bucket}/")
    with Client(settings) as client:
        job = client.submit(prompt="?", media=[photo])
    for name in NAMES:  # what the producer has put there
        os.environ[f"AWS_{name}"] = ""
    limits = MediaLimits.of(Settings(s3_endpoint_url=s3_endpoint))
    (photo_part,) = open_sealed(json.loads(redis.hget(keys.record(job.id), "sealed"))).job.all_media()
    (fetched,) = fetch([photo_part], limits, MediaCache(tmp_path / "cache", 2**24))
    with fetched as file:
        assert file.read() == photo


@pytest.mark.usefixtures("bucket")
def test_doctor_finds_them(s3_endpoint: str) -> None:
    finding = check_s3(s3_endpoint)
    assert finding.severity is Severity.OK, finding
    assert boto3.session.Session().get_credentials().access_key == "of-the-file"


def test_doctor_tells_where_there_are_none(env_file: Path, s3_endpoint: str) -> None:
    env_file.unlink()
    finding = check_s3(s3_endpoint)
    assert finding.severity is Severity.WARNING
    assert ".env" in finding.cure


@pytest.mark.holds(
    "docs/operations.md#which-media-does-a-worker-read",
    "the environment wins, and keys, token, profile and role are taken whole from one of the two",
)
def test_the_environment_wins_and_who_asks_is_taken_whole_from_one_of_the_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "of-the-environment")
    load_aws_names()
    assert {name: os.environ[f"AWS_{name}"] for name in NAMES if os.environ[f"AWS_{name}"]} == {
        "DEFAULT_REGION": "eu-central-1"
    }
