"""Who serves https:// media without end, in drops or not at all, and hosts that are not listed."""

import resource
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from keye.config.codes import ErrorCode
from keye.config.job import ImagePart
from keye.config.settings import Settings
from keye.worker.media.fetch import https
from keye.worker.media.job_media import MediaCache, MediaLimits, fetch
from tests.support.certificates import Authority
from tests.support.fetching import fault_of, fetch_one
from tests.support.liar import Answer, Liar, answer, endlessly, lying

PUBLIC = "93.184.215.14"
PHOTO = "https://media.example/photo.jpg"
WHOLE = answer("200 OK", "Content-Length: 10", body=b"0123456789")
CHUNKED = answer("200 OK", "Transfer-Encoding: chunked")

Leading = Callable[[Liar], None]


@pytest.fixture
def tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ssl.SSLContext]:
    """Of media.example and cdn.media.example, who are trusted here."""
    authority = Authority(tmp_path / "authority")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority.issue("media.example"))
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.path))
    https._tls.cache_clear()
    yield context
    https._tls.cache_clear()


@pytest.fixture
def lead_to(monkeypatch: pytest.MonkeyPatch) -> Leading:
    """Every name is a public address, and that is a server here."""

    def lead_to(liar: Liar) -> None:
        def dial(_: object, timeout: float) -> socket.socket:
            connection = socket.socket()
            connection.settimeout(timeout)
            connection.connect(liar.address)
            return connection

        monkeypatch.setattr(socket, "create_connection", dial)

    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(2, 1, 6, "", (PUBLIC, 443))])
    return lead_to


@pytest.fixture
def limits() -> MediaLimits:
    return MediaLimits.of(Settings(fetch_timeout_seconds=20, max_fetch_seconds=0.7, allow_https=True))


@pytest.fixture
def media_cache(tmp_path: Path) -> MediaCache:
    return MediaCache(tmp_path / "cache", 2**24)


def wait_until_nobody_fetches() -> None:
    while [thread for thread in threading.enumerate() if thread.name == "media"]:
        time.sleep(0.01)  # until the test's own time is over


SLOW: dict[str, Answer] = {
    "silence": endlessly(b"", b"", 0.05),
    "a head": endlessly(b"HTTP/1.1 200 OK\r\nx: ", b"a", 0.05),
    "continue": endlessly(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "a body": endlessly(answer("200 OK", "Content-Length: 99999"), b"a", 0.05),
    "chunks": endlessly(CHUNKED, b"1\r\na\r\n", 0.05),
    "a trailer": endlessly(CHUNKED + b"a\r\n0123456789\r\n0\r\n", b"a: b\r\n" * 100),
}


@pytest.mark.parametrize("dripping", SLOW)
def test_answer_without_end_is_read_no_longer_than_a_download_may_take(
    tls: ssl.SSLContext, lead_to: Leading, limits: MediaLimits, media_cache: MediaCache, dripping: str
) -> None:
    with lying(tls, GET=SLOW[dripping]) as liar:
        lead_to(liar)
        began_at = time.monotonic()
        fault = fault_of(PHOTO, limits, media_cache)
        assert time.monotonic() - began_at < 6
        wait_until_nobody_fetches()
    assert fault.code is ErrorCode.MEDIA_UNREACHABLE
    assert "(KEYE_MAX_FETCH_SECONDS)" in fault.message


@pytest.mark.parametrize("dripping", SLOW)
def test_job_that_is_over_listens_to_no_server(
    tls: ssl.SSLContext, lead_to: Leading, limits: MediaLimits, media_cache: MediaCache, dripping: str
) -> None:
    """Neither the job nor the thread that worked for it."""

    class JobCancelled(Exception):
        pass

    with lying(tls, GET=SLOW[dripping]) as liar:
        lead_to(liar)

        def check() -> None:
            if liar.requests:
                raise JobCancelled

        with pytest.raises(JobCancelled):
            fetch([ImagePart(uri=PHOTO)], replace(limits, max_fetch_seconds=100), media_cache, check)
        began_at = time.monotonic()
        wait_until_nobody_fetches()
        assert time.monotonic() - began_at < 10


@pytest.mark.parametrize(
    "flood",
    [
        endlessly(b"HTTP/1.1 200 OK\r\nx: ", b"a" * 2**20),
        endlessly(b"HTTP/1.1 200 OK\r\n", b"a: b\r\n" * 100),
        endlessly(CHUNKED + b"5;", b"a" * 2**20),
        endlessly(b"", bytes(2**20)),
        lambda: answer("200 OK", "Content-Length: -5", body=b"01234"),
        lambda: answer("999 What"),
        lambda: b"",
    ],
    ids=["a header", "headers", "the size of a chunk", "zeros", "a length below 0", "a status", "nothing"],
)
def test_server_that_tells_lies_is_unreachable_and_fills_no_memory(
    tls: ssl.SSLContext, lead_to: Leading, limits: MediaLimits, media_cache: MediaCache, flood: Answer
) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with lying(tls, GET=flood) as liar:
        lead_to(liar)
        fault = fault_of(PHOTO, replace(limits, max_fetch_seconds=20), media_cache)
        assert liar.num_sent < 20 * 2**20
    assert fault.code in (ErrorCode.MEDIA_UNREACHABLE, ErrorCode.MEDIA_CORRUPT)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 100 * 2**10


@pytest.mark.holds("docs/operations.md#how-long-may-a-job-take", "finding and connecting to who has it included")
def test_silent_addresses_count_against_the_time_of_a_download(
    limits: MediaLimits, media_cache: MediaCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many there are, each of them silent for as long as it may be."""
    over = threading.Event()

    def dial(_: object, timeout: float) -> Any:
        over.wait(timeout)
        raise TimeoutError

    addresses = [(2, 1, 6, "", (f"93.184.216.{number}", 443)) for number in range(1, 21)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: addresses)
    monkeypatch.setattr(socket, "create_connection", dial)
    began_at = time.monotonic()
    fault = fault_of(PHOTO, replace(limits, fetch_timeout_seconds=0.5, max_fetch_seconds=1), media_cache)
    assert time.monotonic() - began_at < 4
    assert fault.code is ErrorCode.MEDIA_UNREACHABLE
    assert "(KEYE_MAX_FETCH_SECONDS)" in fault.message


@pytest.mark.holds("docs/operations.md#how-long-may-a-job-take", "finding and connecting to who has it included")
def test_resolver_that_hangs_counts_against_the_time_of_a_download(
    limits: MediaLimits, media_cache: MediaCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: over.wait(60) and [])
    began_at = time.monotonic()
    fault = fault_of(PHOTO, limits, media_cache)
    assert time.monotonic() - began_at < 6
    over.set()
    assert fault.code is ErrorCode.MEDIA_UNREACHABLE
    assert "(KEYE_MAX_FETCH_SECONDS)" in fault.message


def test_handshake_in_drops_counts_against_the_time_of_a_download(
    tls: ssl.SSLContext, lead_to: Leading, limits: MediaLimits, media_cache: MediaCache
) -> None:
    """A record of TLS as it should be, of 16 KB, a byte at a time; each of them is in time."""
    record = b"\x16\x03\x03\x40\x00\x02\x00\x3f\xfc"
    with lying(greeting=endlessly(record, b"\x00", 0.05)) as liar:
        lead_to(liar)
        began_at = time.monotonic()
        fault = fault_of(PHOTO, limits, media_cache)
        assert time.monotonic() - began_at < 6
        assert liar.num_sent > len(record)
    assert fault.code is ErrorCode.MEDIA_UNREACHABLE
    assert "(KEYE_MAX_FETCH_SECONDS)" in fault.message


@pytest.mark.holds(
    "docs/operations.md#which-media-does-a-worker-read",
    "from any public host or from those in `KEYE_HTTPS_HOSTS`",
)
def test_host_that_is_not_listed_is_not_even_looked_up(
    tls: ssl.SSLContext, lead_to: Leading, limits: MediaLimits, media_cache: MediaCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    with lying(tls, GET=lambda: WHOLE) as liar:
        lead_to(liar)
        look_up = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_, **__: asked.append(host) or look_up(host, 443))
        listed = replace(limits, https_hosts=("media.example",), max_fetch_seconds=20)
        for spelling in ("media.example", "MEDIA.example", "media.example.", "media.example:8443", "media。example"):
            assert fetch_one(f"https://{spelling}/photo.jpg", listed, media_cache) == b"0123456789"
        del asked[:]
        for other in ("cdn.media.example", "media.example.evil.example", "xmedia.example", PUBLIC, "[2606:4700::1111]"):
            fault = fault_of(f"https://{other}/photo.jpg", listed, media_cache)
            assert fault.code is ErrorCode.MEDIA_FORBIDDEN, other
            assert "(KEYE_HTTPS_HOSTS)" in fault.message
        assert asked == []


@pytest.mark.holds("docs/operations.md#which-media-does-a-worker-read", "each checked again")
def test_redirect_to_a_host_that_is_not_listed_is_not_followed(
    tls: ssl.SSLContext, lead_to: Leading, limits: MediaLimits, media_cache: MediaCache
) -> None:
    to_other = answer("302 Found", "Location: https://other.example/x", "Content-Length: 0")
    with lying(tls, GET=lambda: to_other) as liar:
        lead_to(liar)
        fault = fault_of(PHOTO, replace(limits, https_hosts=("media.example",), max_fetch_seconds=20), media_cache)
        assert len(liar.requests) == 1
    assert fault.code is ErrorCode.MEDIA_FORBIDDEN
    # Where it leads is not the caller's to see.
    assert "other.example" not in fault.message


@pytest.mark.holds(
    "docs/operations.md#which-media-does-a-worker-read",
    "the list alone allows none",
    "only with `KEYE_ALLOW_HTTPS=true`",
)
def test_a_list_of_hosts_alone_does_not_allow_https(limits: MediaLimits, media_cache: MediaCache) -> None:
    fault = fault_of(PHOTO, replace(limits, allow_https=False, https_hosts=("media.example",)), media_cache)
    assert fault.code is ErrorCode.MEDIA_FORBIDDEN
    assert "KEYE_ALLOW_HTTPS" in fault.message
