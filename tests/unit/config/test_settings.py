"""Settings as an operator writes them: what they are read as, and how those that mean nothing are refused."""

from pathlib import Path
from typing import Any

import pytest

from keye.config.faults import InvalidSettings
from keye.config.settings import ProducerSettings, Settings


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Any:
    def read(name: str, value: str) -> Any:
        monkeypatch.setenv(f"KEYE_{name.upper()}", value)
        return getattr(Settings.read(), name)

    return read


@pytest.mark.holds("docs/operations.md#it-does-not-start-why", "An empty value counts as none")
@pytest.mark.parametrize("value", ["", "  "])
@pytest.mark.parametrize("name", Settings.model_fields)
def test_an_empty_value_is_none(read: Any, name: str, value: str) -> None:
    assert read(name, value) == getattr(Settings(), name)


def test_an_empty_value_of_the_environment_leaves_that_of_the_file(read: Any, folder: Path) -> None:
    (folder / ".env").write_text("KEYE_CONCURRENCY=3\nKEYE_S3_ENDPOINT_URL=\n")
    assert read("concurrency", "") == 3
    assert Settings.read().s3_endpoint_url is None


@pytest.mark.parametrize(
    "url",
    [
        *("x", "http://hunter2", "redis//hunter2", "redis://[::1", "redis://:hunter2#@127.0.0.1:1/0"),
        *("redis://cache/abc", "redis://cache/1/2", "redis://cache:port/0", "redis://cache/-1"),
        *(
            "redis://cache/0?hunter2=1",
            "redis://cache/0?socket_timeout=hunter2",
            "rediss://cache/0?ssl_cert_reqs=hunter2",
        ),
    ],
)
def test_a_url_of_redis_that_is_none_is_refused_without_its_secrets(read: Any, url: str) -> None:
    with pytest.raises(InvalidSettings, match="KEYE_REDIS_URL") as refusal:
        read("redis_url", url)
    assert "hunter2" not in str(refusal.value)
    with pytest.raises(InvalidSettings):
        ProducerSettings.read()


@pytest.mark.parametrize("url", ["redis://cache", "redis://cache/", "redis://:a%2Fb@cache:6379/15", "rediss://[::1]/0"])
def test_a_url_of_redis_is_taken_as_it_is(read: Any, url: str) -> None:
    assert read("redis_url", url).get_secret_value() == url


@pytest.mark.parametrize(
    "url",
    [
        *(
            "minio",
            "minio:9000",
            "http://",
            "http:///x",
            "ftp://minio",
            "http://my_minio:9000",
            "http://a b",
            "http://-a",
        ),
        *(
            "http://minio:99999",
            "http://minio:port",
            "http://[::1",
            "http://me:word@minio",
            "http://minio/?a=1",
            "http://ä",
        ),
    ],
)
def test_an_endpoint_of_s3_that_is_none_is_refused(read: Any, url: str) -> None:
    with pytest.raises(
        InvalidSettings, match=r"KEYE_S3_ENDPOINT_URL: it is no endpoint of S3. Write https://host:port"
    ):
        read("s3_endpoint_url", url)


@pytest.mark.parametrize(
    "url", ["http://minio:9000", "https://s3.eu-1.example.com/", "http://[::1]:9000", "HTTP://A.B/c"]
)
def test_an_endpoint_of_s3_is_taken_as_it_is(read: Any, url: str) -> None:
    assert read("s3_endpoint_url", url) == url


def test_buckets_may_be_written_as_their_uris(read: Any) -> None:
    assert read("s3_buckets", "photos, s3://scans,S3://clips/") == ("photos", "scans", "clips")


@pytest.mark.parametrize("value", ["s3://photos/2026", "photos/2026", "arn:aws:s3:::photos", "a b", "s3://", "*"])
def test_what_is_no_bucket_is_refused(read: Any, value: str) -> None:
    with pytest.raises(InvalidSettings, match=r"KEYE_S3_BUCKETS: .* is no bucket. Write names of whole buckets"):
        read("s3_buckets", f"scans,{value}")


@pytest.mark.parametrize("value", ["results", "/keep", "results/"])
def test_what_names_no_queue_and_task_is_refused(read: Any, value: str) -> None:
    with pytest.raises(InvalidSettings, match=r"KEYE_CELERY_CANVAS: .* names no queue and task. Write queue/task"):
        read("celery_canvas", f"results/*,{value}")


@pytest.mark.holds("docs/operations.md#it-does-not-start-why", "a path may begin with `~`")
def test_a_home_is_found_as_a_shell_would(read: Any) -> None:
    assert read("model_path", "~/models") == Path.home() / "models"
    assert read("media_roots", "~/a:/b") == (Path.home() / "a", Path("/b"))
    with pytest.raises(InvalidSettings, match="home that is not known"):
        read("cache_folder", "~nobody-of-that-name/cache")


def test_a_wrong_setting_is_the_only_one_that_is_blamed(read: Any) -> None:
    with pytest.raises(InvalidSettings, match=r"^KEYE_HOST_WORKERS: Input should be greater than or equal to 1$"):
        read("host_workers", "0")


def test_a_file_that_is_no_text_is_told(folder: Path) -> None:
    (folder / ".env").write_bytes(b"KEYE_CONCURRENCY=\xff\n")
    with pytest.raises(InvalidSettings, match=r"\.env in .* cannot be read"):
        Settings.read()


@pytest.mark.holds("docs/operations.md#it-does-not-start-why", "no setting, in the environment or `.env`, is a warning")
def test_names_are_those_of_the_environment_and_of_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / ".env").write_text("KEYE_MODELPATH=/a\nkeye_device=cpu\nAWS_PROFILE=b\n")
    monkeypatch.setenv("KEYE_LEASE_SECOND", "3")
    assert {"KEYE_MODELPATH", "KEYE_DEVICE", "KEYE_LEASE_SECOND"} <= set(Settings.names_given())
    assert all(name.startswith("KEYE_") for name in Settings.names_given())


def test_hosts_of_https_have_one_spelling(read: Any) -> None:
    written = (
        "Media.Example.com., https://cdn.example.com/,*.CDN.example.org,bücher.example, 93.184.215.14,[2606:4700::11]"
    )
    names = ("media.example.com", "cdn.example.com", "*.cdn.example.org", "xn--bcher-kva.example")
    assert read("https_hosts", written) == (*names, "93.184.215.14", "2606:4700::11")


@pytest.mark.parametrize(
    "value",
    ["*", "*.", "a b", "https://a/b", "http://a", "a:443", "user@a", "*.1", "a.*", "1.2.3.999", "a..b", "x" * 64],
)
def test_what_is_no_host_is_refused(read: Any, value: str) -> None:
    with pytest.raises(InvalidSettings, match=r"KEYE_HTTPS_HOSTS: .* is no host. Write names without port or path"):
        read("https_hosts", f"media.example.com,{value}")
