"""A process that may open no more files blames itself: not the medium, its store, its server or the resolver."""

from pathlib import Path

import boto3
import pytest

from tests.support.few_files import outcomes_with_few_files

CONTENT = b"cat"


def blames_the_host(outcomes: list[str], content: str = CONTENT.hex()) -> bool:
    """With no file at least; and nothing stays of it."""
    return outcomes[0] == "host" and outcomes[-1] == content and set(outcomes) == {"host", content}


@pytest.mark.parametrize("is_cold", [True, False])
def test_local_and_inline_media(tmp_path: Path, is_cold: bool) -> None:
    (tmp_path / "cat.jpg").write_bytes(CONTENT)
    for uri in (f"{tmp_path}/cat.jpg", "data:,cat"):
        outcomes = outcomes_with_few_files(uri, tmp_path / "cache", is_cold=is_cold, media_roots=[str(tmp_path)])
        assert blames_the_host(outcomes), outcomes


@pytest.mark.parametrize("is_cold", [True, False])
def test_objects_of_s3(s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_cold: bool) -> None:
    """The credentials stand in a file, which boto3 passes over where it cannot be opened."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "credentials").write_text("[default]\naws_access_key_id = testing\naws_secret_access_key = testing\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    client = boto3.session.Session().client("s3", endpoint_url=s3_endpoint)
    client.create_bucket(Bucket="media")
    client.put_object(Bucket="media", Key="cat.jpg", Body=CONTENT)
    client.close()
    cache = tmp_path / "cache"
    outcomes = outcomes_with_few_files("s3://media/cat.jpg", cache, is_cold=is_cold, s3_endpoint_url=s3_endpoint)
    assert blames_the_host(outcomes), outcomes


def test_hosts_that_are_looked_up(tmp_path: Path) -> None:
    """This one is not there: known only to who could ask."""
    outcomes = outcomes_with_few_files("https://nowhere.invalid/cat.jpg", tmp_path, is_cold=True, allow_https=True)
    assert outcomes[0] == "host"
    assert "MEDIA_NOT_FOUND" in outcomes[-1] or "MEDIA_UNREACHABLE" in outcomes[-1]
    assert set(outcomes) == {"host", outcomes[-1]}
