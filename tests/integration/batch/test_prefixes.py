"""Prefixes of a bucket on a real S3 server: each object comes once, whatever its key is and whatever changes."""

from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING
from urllib.request import Request, urlopen

import boto3
import pytest

from keye.config.faults import InvalidBatch
from keye.producer.batch.listing import Prefix
from keye.producer.batch.opening import open_source
from keye.producer.client import build_job
from tests.support.ports import free_port

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client


@pytest.fixture
def store(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> "S3Client":
    for name, value in {
        "ACCESS_KEY_ID": "testing",
        "SECRET_ACCESS_KEY": "secret",
        "DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    urlopen(Request(f"{s3_endpoint}/moto-api/reset", method="POST")).close()
    client = boto3.session.Session().client("s3", endpoint_url=s3_endpoint)
    client.create_bucket(Bucket="photos")
    return client


def fill(store: "S3Client", *keys: str) -> None:
    for key in keys:
        store.put_object(Bucket="photos", Key=key, Body=b"")


@pytest.fixture
def prefix(s3_endpoint: str, store: "S3Client") -> Prefix:
    return Prefix("s3://photos/", s3_endpoint)


def keys_of(prefix: Prefix) -> list[str | None]:
    return [line.custom_id for line in prefix.lines()]


ODD = [
    "a b.jpg",
    "ä/日本.JPG",
    "1+1.jpg",
    "50%.jpg",
    "%41.jpg",
    "a#b.jpg",
    "what?.jpg",
    "a&b=c.jpg",
    "//x.jpg",
    "a\\b.jpg",
]


@pytest.mark.holds(
    "docs/batches.md#what-can-the-input-be",
    "a prefix of a bucket |",
)
def test_keys_come_in_the_order_of_their_bytes_and_as_they_are(store: "S3Client", prefix: Prefix) -> None:
    fill(store, *ODD, "B.jpg", "b.mp4", "\ue000.jpg", "😀.jpg")
    fill(store, "a/", "folder.jpg/", "notes.txt", "hash")
    lines = list(prefix.lines())
    keys = [line.custom_id or "" for line in lines]
    assert keys == sorted([*ODD, "B.jpg", "b.mp4", "\ue000.jpg", "😀.jpg"], key=str.encode)
    assert prefix.num_passed_over == 2
    for line in lines:
        assert prefix.read(line.number, line.start) == line
        (part,) = build_job({"prompt": "?", **line.asked}).media  # type: ignore[dict-item]
        assert part.uri == f"s3://photos/{line.custom_id}"
        assert part.type == ("video" if line.custom_id == "b.mp4" else "image")


@pytest.mark.parametrize(
    ("given", "keys"),
    [
        ("s3://photos", ["A/1.jpg", "a/1.jpg", "a/b/2.jpg", "ab.jpg"]),
        ("S3://photos/", ["A/1.jpg", "a/1.jpg", "a/b/2.jpg", "ab.jpg"]),
        ("s3://photos/a", ["a/1.jpg", "a/b/2.jpg", "ab.jpg"]),
        ("s3://photos/a/", ["a/1.jpg", "a/b/2.jpg"]),
        ("s3://photos/A/1.jpg", ["A/1.jpg"]),
        ("s3://photos/none/", []),
    ],
)
def test_what_a_prefix_names(store: "S3Client", s3_endpoint: str, given: str, keys: list[str]) -> None:
    fill(store, "A/1.jpg", "a/1.jpg", "a/b/2.jpg", "ab.jpg")
    source = open_source(given, True, s3_endpoint)
    assert isinstance(source, Prefix)
    assert keys_of(source) == keys


def test_what_changes_while_it_is_read_comes_once_and_it_goes_on_behind_the_last(
    store: "S3Client", prefix: Prefix, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over three pages, of which the first is read when the objects change."""
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "10")
    fill(store, *(f"{number:02}.jpg" for number in range(25)))
    lines = prefix.lines()
    seen = [next(lines).custom_id]
    fill(store, "-.jpg", "00.jpg", "05a.jpg", "15a.jpg", "24a.jpg")
    for key in ("00.jpg", "02.jpg", "20.jpg"):
        store.delete_object(Bucket="photos", Key=key)
    seen += [line.custom_id for line in lines]
    assert seen == sorted({f"{number:02}.jpg" for number in range(25)} - {"20.jpg"} | {"15a.jpg", "24a.jpg"})
    fill(store, "3.jpg")
    later = Prefix("s3://photos/", s3_endpoint)
    later.go_to(prefix.position)
    (added,) = later.lines()
    assert (added.custom_id, added.number) == ("3.jpg", 27)


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ("s3://nowhere/", "s3://nowhere/ cannot be listed: NoSuchBucket. Check the name, KEYE_S3_ENDPOINT_URL"),
        ("s3://", "s3:/// cannot be listed: "),
        ("s3://no bucket", "s3://no bucket/ cannot be listed: "),
    ],
)
def test_a_bucket_that_is_not_there_is_told(store: "S3Client", s3_endpoint: str, given: str, fault: str) -> None:
    with pytest.raises(InvalidBatch, match=fault):
        list(Prefix(given, s3_endpoint).lines())


@pytest.mark.parametrize(
    ("endpoint", "fault"),
    [("http://127.0.0.1:{port}", "EndpointConnectionError"), ("no url", "ValueError")],
)
def test_a_store_that_is_not_there_is_told(store: "S3Client", endpoint: str, fault: str) -> None:
    with pytest.raises(InvalidBatch, match=f"cannot be listed: {fault}. Check the name"):
        list(Prefix("s3://photos/", endpoint.format(port=free_port())).lines())


LISTED = b"<ListBucketResult><IsTruncated>false</IsTruncated>%s</ListBucketResult>"


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (
            LISTED % b"<Contents><Key>b.jpg</Key></Contents><Contents><Key>a.jpg</Key></Contents>",
            "does not list its keys",
        ),
        (LISTED % (b"<Contents><Key>a.jpg</Key></Contents>" * 2), "does not list its keys in the order of their bytes"),
        (b"<html><p>Welcome!", "cannot be listed: 500"),
        (LISTED % b"<Contents></Contents>", "cannot be listed: KeyError"),
    ],
)
@pytest.mark.usefixtures("store")
def test_a_store_that_is_not_like_s3_is_told_and_never_listed_twice(answer: bytes, fault: str) -> None:
    class Store(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Store) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        prefix = Prefix("s3://photos/", f"http://127.0.0.1:{server.server_port}")
        try:
            with pytest.raises(InvalidBatch, match=fault):
                list(prefix.lines())
        finally:
            server.shutdown()


def test_credentials_that_are_not_there_are_told(
    s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.delenv(f"AWS_{name}", raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(InvalidBatch, match=r"NoCredentialsError\. Check .* and the credentials"):
        # A client of its own, which has seen no credentials.
        list(Prefix("s3://photos/", f"{s3_endpoint}/").lines())


@pytest.mark.parametrize("name", ["in.jsonl", "a/in.CSV", "in.json"])
def test_a_file_in_a_bucket_is_to_be_downloaded(name: str) -> None:
    with pytest.raises(InvalidBatch, match=r"is a file of a bucket\. Download it"):
        open_source(f"s3://photos/{name}", True, None)
