"""A store that tells lies, or never ends, costs its job a code, and the worker neither memory nor time nor a thread."""

import resource
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from keye.config.codes import ErrorCode
from keye.config.faults import Fault
from keye.config.job import ImagePart
from keye.config.settings import Settings
from keye.worker.media.job_media import MediaCache, MediaLimits, fetch
from tests.support.certificates import Authority
from tests.support.fetching import fault_of, fetch_one
from tests.support.liar import Answer, Liar, answer, endlessly, lying

CONTENT = b"0123456789"
OBJECT = 'ETag: "1"', "Content-Length: 10"
HEAD = answer("200 OK", *OBJECT)
PART = ('ETag: "1"', "Content-Range: bytes 0-9/10")
WHOLE = answer("206 Partial Content", *PART, "Content-Length: 10", body=CONTENT)
REFUSED = answer("403 Forbidden", "Content-Length: 0")
CHUNKED = "Transfer-Encoding: chunked"
MEBIBYTE = b"<" * 2**20
CHUNK = b"100000\r\n" + MEBIBYTE + b"\r\n"

# Each entity ten of the one before: a hundred million letters in a kilobyte.
ENTITIES = b"".join(b'<!ENTITY %c "%s">' % (98 + n, b"&%c;" % (97 + n) * 10) for n in range(8))
BOMB = b"<!DOCTYPE e [<!ENTITY a 'x'>%s]><Error><Code>&i;</Code></Error>" % ENTITIES

UNREACHABLE, FORBIDDEN = ErrorCode.MEDIA_UNREACHABLE, ErrorCode.MEDIA_FORBIDDEN


def always(said: bytes) -> Answer:
    return lambda: said


def error(code: bytes, status: str = "403 Forbidden") -> bytes:
    body = b"<Error><Code>%s</Code></Error>" % code
    return answer(status, f"Content-Length: {len(body)}", body=body)


# What HEAD is told, and GET; all of them at once.
LIES: dict[str, tuple[Answer, Answer, ErrorCode]] = {
    "an endless error": (always(REFUSED), endlessly(answer("403 Forbidden", CHUNKED), CHUNK), FORBIDDEN),
    "an endless error without chunks": (always(REFUSED), endlessly(answer("403 Forbidden"), MEBIBYTE), FORBIDDEN),
    "an endless header": (endlessly(b"HTTP/1.1 200 OK\r\nx: ", MEBIBYTE), always(WHOLE), UNREACHABLE),
    "endless headers": (endlessly(b"HTTP/1.1 200 OK\r\n", b"a: b\r\n" * 100), always(WHOLE), UNREACHABLE),
    "an endless size of a chunk": (
        always(HEAD),
        endlessly(answer("206 Partial Content", *PART, CHUNKED) + b"5;", MEBIBYTE),
        UNREACHABLE,
    ),
    "no ETag": (always(answer("200 OK", "Content-Length: 10")), always(WHOLE), UNREACHABLE),
    "no length": (always(answer("200 OK", 'ETag: "1"')), always(WHOLE), UNREACHABLE),
    "neither": (always(answer("200 OK")), always(WHOLE), UNREACHABLE),
    "an ETag of no letters": (
        always(answer("200 OK", 'ETag: "\x01\xff"', "Content-Length: 10")),
        always(WHOLE),
        UNREACHABLE,
    ),
    **{
        f"the length {length[:9]}": (
            always(answer("200 OK", 'ETag: "1"', f"Content-Length: {length}")),
            always(WHOLE),
            ErrorCode.MEDIA_TOO_LARGE if length.isdecimal() and len(length) < 4000 else UNREACHABLE,
        )
        for length in ("-1", "-1000000", "ten", "1e3", "0x10", "10, 11", "1" + "0" * 30, "1" + "0" * 5000)
    },
    "a date that is none": (always(answer("200 OK", *OBJECT, "Last-Modified: never")), always(WHOLE), UNREACHABLE),
    "a part without ETag": (
        always(HEAD),
        always(answer("206 Partial Content", "Content-Length: 10", body=CONTENT)),
        UNREACHABLE,
    ),
    "a part of no length": (
        always(HEAD),
        always(answer("206 Partial Content", *PART, "Content-Length: ten", body=CONTENT)),
        UNREACHABLE,
    ),
    "another part": (always(HEAD), always(WHOLE.replace(b"0-9/10", b"5-14/10")), UNREACHABLE),
    "half a part": (always(HEAD), always(WHOLE[:-5]), UNREACHABLE),
    "nothing of a part": (
        always(HEAD),
        always(answer("206 Partial Content", *PART, CHUNKED, body=b"0\r\n\r\n")),
        UNREACHABLE,
    ),
    "no content": (always(HEAD), always(answer("204 No Content")), UNREACHABLE),
    **{
        f"a bare {status}": (always(answer(f"{status} Moved", "Content-Length: 0")), always(WHOLE), FORBIDDEN)
        for status in (300, 301, 302, 303, 304, 307, 308)
    },
    "a bare 301 of a part": (always(HEAD), always(answer("301 Moved", "Content-Length: 0")), FORBIDDEN),
    "a region that is none": (
        always(answer("301 Moved", "x-amz-bucket-region: 127.0.0.1/?", "Content-Length: 0")),
        always(WHOLE),
        UNREACHABLE,
    ),
    "a page": (
        always(REFUSED),
        always(answer("403 Forbidden", "Content-Length: 15", body=b"<html>No</html>")),
        FORBIDDEN,
    ),
    "an error of no text": (
        always(REFUSED),
        always(answer("403 Forbidden", "Content-Length: 256", body=bytes(range(256)))),
        FORBIDDEN,
    ),
    "an empty error": (always(REFUSED), always(REFUSED), FORBIDDEN),
    "a bomb": (
        always(REFUSED),
        always(answer("403 Forbidden", f"Content-Length: {len(BOMB)}", body=BOMB)),
        FORBIDDEN,
    ),
    "a code of 5 MB": (always(REFUSED), always(error(b"A" * 5_000_000)), FORBIDDEN),
    "a code of 60 KB": (always(REFUSED), always(error(b"A" * 60_000)), FORBIDDEN),
    "a code of lines": (always(REFUSED), always(error(b"Access\r\n\nDenied &#27;")), FORBIDDEN),
    "a code in a code": (always(REFUSED), always(error(b"<a>x</a>")), UNREACHABLE),
    "the status 999": (always(answer("999 What", "Content-Length: 0")), always(WHOLE), UNREACHABLE),
    "the status 101": (always(answer("101 Switching")), always(WHOLE), UNREACHABLE),
    "no HTTP": (always(b"hello"), always(WHOLE), UNREACHABLE),
    "nothing": (always(b""), always(WHOLE), UNREACHABLE),
    "zeros": (endlessly(b"", bytes(4096)), always(WHOLE), UNREACHABLE),
    "to come back in years": (
        always(answer("503 Busy", "Retry-After: 99999999999", "Content-Length: 0")),
        always(WHOLE),
        UNREACHABLE,
    ),
}

# What goes on for as long as it is listened to.
SLOW: dict[str, tuple[Answer, Answer]] = {
    "silence": (endlessly(b"", b"", 0.05), always(WHOLE)),
    "a head": (endlessly(b"HTTP/1.1 200 OK\r\nx: ", b"a", 0.05), always(WHOLE)),
    "an error": (always(REFUSED), endlessly(answer("403 Forbidden", "Content-Length: 50000"), b"<", 0.05)),
    "chunks of an error": (always(REFUSED), endlessly(answer("403 Forbidden", CHUNKED), b"1\r\n<\r\n", 0.05)),
    "an object": (
        always(answer("200 OK", 'ETag: "1"', "Content-Length: 99999")),
        endlessly(answer("206 Partial Content", 'ETag: "1"', "Content-Length: 99999"), b"a", 0.05),
    ),
    "continue": (endlessly(b"", b"HTTP/1.1 100 Continue\r\n\r\n"), always(WHOLE)),
    "a trailer": (
        always(HEAD),
        endlessly(answer("206 Partial Content", *PART, CHUNKED, body=b"a\r\n0123456789\r\n0\r\n"), b"a: b\r\n" * 100),
    ),
}


@pytest.fixture
def limits_of() -> Callable[[Liar], MediaLimits]:
    def limits_of(liar: Liar) -> MediaLimits:
        return MediaLimits.of(Settings(s3_endpoint_url=liar.url, fetch_timeout_seconds=20, max_fetch_seconds=20))

    return limits_of


def assert_nothing_is_left(cache_folder: Path) -> None:
    while [thread for thread in threading.enumerate() if thread.name == "media"]:
        time.sleep(0.01)  # until the test's own time is over
    assert not [path for path in cache_folder.glob("*/*") if path.is_file()]


@pytest.mark.parametrize("lie", LIES)
def test_lie_of_a_store_has_a_code_and_leaves_nothing(
    limits_of: Callable[[Liar], MediaLimits], media_cache: MediaCache, tmp_path: Path, lie: str
) -> None:
    head, get, code = LIES[lie]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with lying(HEAD=head, GET=get) as liar:
        fault = fault_of("s3://media/photo.jpg", limits_of(liar), media_cache)
        assert_nothing_is_left(tmp_path / "cache")
        assert liar.num_sent < 50 * 2**20
    assert fault.code is code
    assert fault.message.isprintable()
    assert len(fault.message) < 250
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 100 * 2**10


@pytest.mark.parametrize("dripping", SLOW)
def test_answer_without_end_is_read_no_longer_than_a_download_may_take(
    limits_of: Callable[[Liar], MediaLimits], media_cache: MediaCache, tmp_path: Path, dripping: str
) -> None:
    head, get = SLOW[dripping]
    with lying(HEAD=head, GET=get) as liar:
        began_at = time.monotonic()
        fault = fault_of("s3://media/photo.jpg", replace(limits_of(liar), max_fetch_seconds=0.7), media_cache)
        assert time.monotonic() - began_at < 6
        assert_nothing_is_left(tmp_path / "cache")
    assert fault.code is UNREACHABLE
    assert "(KEYE_MAX_FETCH_SECONDS)" in fault.message


def test_store_of_tls_is_read_as_it_was_and_bounded_as_well(
    limits_of: Callable[[Liar], MediaLimits], media_cache: MediaCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = Authority(tmp_path / "authority")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(authority.issue("127.0.0.1"))
    monkeypatch.setenv("AWS_CA_BUNDLE", str(authority.path))
    with lying(tls, HEAD=always(HEAD), GET=always(WHOLE)) as honest:
        url = honest.url.replace("http:", "https:")
        assert fetch_one("s3://media/k", replace(limits_of(honest), s3_endpoint_url=url), media_cache) == CONTENT
    head, get = SLOW["an object"]
    hello = endlessly(b"\x16\x03\x03\x40\x00\x02\x00\x3f\xfc", b"\x00", 0.05)
    for liar in (lying(tls, HEAD=head, GET=get), lying(greeting=hello)):
        with liar as dripping:
            url = dripping.url.replace("http:", "https:")
            limits = replace(limits_of(dripping), s3_endpoint_url=url, max_fetch_seconds=0.7)
            began_at = time.monotonic()
            assert "(KEYE_MAX_FETCH_SECONDS)" in fault_of("s3://media/k", limits, media_cache).message
            assert time.monotonic() - began_at < 6


def test_store_behind_a_proxy_is_read(
    limits_of: Callable[[Liar], MediaLimits], media_cache: MediaCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    with lying(HEAD=always(HEAD), GET=always(WHOLE)) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        limits = replace(limits_of(proxy), s3_endpoint_url="http://store.example:9000")
        assert fetch_one("s3://media/k", limits, media_cache) == CONTENT
        assert proxy.requests[0] == "HEAD http://store.example:9000/media/k HTTP/1.1"


def test_store_that_is_busy_is_tried_again_no_longer_than_a_download_may_take(
    limits_of: Callable[[Liar], MediaLimits], media_cache: MediaCache
) -> None:
    with lying(HEAD=always(answer("503 Busy", "Content-Length: 0"))) as liar:
        began_at = time.monotonic()
        assert fault_of("s3://a-b/c", replace(limits_of(liar), max_fetch_seconds=0.2), media_cache).code is UNREACHABLE
        assert time.monotonic() - began_at < 5


@pytest.mark.parametrize("dripping", SLOW)
def test_job_that_is_over_listens_to_no_store(
    limits_of: Callable[[Liar], MediaLimits], media_cache: MediaCache, tmp_path: Path, dripping: str
) -> None:
    """Neither the job nor the threads that worked for it."""

    class JobCancelled(Exception):
        pass

    head, get = SLOW[dripping]
    with lying(HEAD=head, GET=get) as liar:

        def check() -> None:
            if liar.requests:
                raise JobCancelled

        with pytest.raises(JobCancelled):
            fetch([ImagePart(uri="s3://media/photo.jpg")], limits_of(liar), media_cache, check)
        began_at = time.monotonic()
        assert_nothing_is_left(tmp_path / "cache")
        assert time.monotonic() - began_at < 10


@pytest.mark.parametrize(
    "get",
    [
        endlessly(WHOLE, MEBIBYTE),
        endlessly(answer("206 Partial Content", *PART, "Content-Length: 10", CHUNKED), CHUNK),
        always(answer("200 OK", *OBJECT, body=CONTENT)),
        always(answer("206 Partial Content", *PART, CHUNKED, body=b"a\r\n0123456789\r\n0\r\n\r\n")),
        always(answer("206 Partial Content", *PART, "Content-Length: 10", "Content-Encoding: gzip", body=CONTENT)),
    ],
    ids=["more than promised", "chunks without end", "all for a part", "a part in chunks", "no gzip"],
)
def test_of_an_object_as_much_is_taken_as_it_has(
    limits_of: Callable[[Liar], MediaLimits], media_cache: MediaCache, get: Answer
) -> None:
    with lying(HEAD=always(HEAD), GET=get) as liar:
        assert len(fetch_one("s3://media/photo.jpg", limits_of(liar), media_cache)) == 10
        assert liar.num_sent < 50 * 2**20


@pytest.mark.holds(
    "docs/operations.md#which-media-does-a-worker-read", "Where a store sends elsewhere, a worker does not follow"
)
@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_store_that_sends_to_another_host_is_not_followed(
    limits_of: Callable[[Liar], MediaLimits], media_cache: MediaCache, status: int
) -> None:
    """With the worker's signature, to who knows whom."""
    with lying(HEAD=always(HEAD), GET=always(WHOLE)) as other:
        to_other = answer(f"{status} Moved", f"Location: {other.url}/media/photo.jpg", "Content-Length: 0")
        with lying(HEAD=always(to_other), GET=always(to_other)) as liar:
            fault = fault_of("s3://media/photo.jpg", limits_of(liar), media_cache)
            # botocore asks once where the bucket is.
            assert len(liar.requests) <= 2
        assert other.requests == []
    assert fault.code is FORBIDDEN
    assert f"sends elsewhere ({status})" in fault.message


@pytest.mark.holds(
    "docs/operations.md#which-media-does-a-worker-read", "no `.` or `..` between slashes, which some stores take"
)
@pytest.mark.parametrize(
    "key",
    [
        *(
            "../private/x",
            "..",
            ".",
            "a/../../private/x",
            "./x",
            "a/.",
            "a/..",
            "%2e%2e/private/x",
            "%252E%252e/private/x",
        ),
        *("..%2fprivate/x", "..\\private\\x", "a/..%5cprivate", "..;/private/x", "..;a=b/private", ".;/x"),
    ],
)
def test_key_that_could_lead_to_another_bucket_is_forbidden_and_never_asked_for(
    limits_of: Callable[[Liar], MediaLimits], media_cache: MediaCache, key: str
) -> None:
    with lying(HEAD=always(HEAD), GET=always(WHOLE)) as liar:
        limits = replace(limits_of(liar), s3_buckets=("public",))
        fault = fault_of(f"s3://public/{key}", limits, media_cache)
        assert liar.requests == []
    assert fault.code is FORBIDDEN
    assert "'.' or '..' between slashes in its key" in fault.message


@pytest.mark.parametrize(
    "key", ["a..b", "..a/b..", "a//b", "/a", "a\\b.jpg", "100%.jpg", "a?b#c", "...", "a b/ä.jpg", "a\nb: c", "%00"]
)
def test_any_other_key_stays_in_its_bucket_whatever_it_holds(
    limits_of: Callable[[Liar], MediaLimits], media_cache: MediaCache, key: str
) -> None:
    with lying(HEAD=always(HEAD), GET=always(WHOLE)) as liar:
        assert fetch_one(f"s3://public/{key}", limits_of(liar), media_cache) == CONTENT
        for request in liar.requests:
            _, target, _ = request.split(" ")
            assert target.startswith("/public/")
            assert not {"?", "#", "\\"} & set(target)
            assert not {".", ".."} & set(target.split("/"))


@pytest.mark.parametrize(
    "bucket",
    [
        *(
            "..",
            ".",
            "a",
            "ab",
            "b?x",
            "b%2f..",
            "media:80@evil.example",
            "media@evil.example",
            "media#x",
            "me dia",
            "ärger",
        ),
        *("arn:aws:s3:us-east-1:123456789012:accesspoint:name", "arn:aws:s3:::media", "a" * 256, "evil.example:443"),
    ],
)
def test_what_is_no_bucket_is_not_found_and_never_asked_for(
    limits_of: Callable[[Liar], MediaLimits], media_cache: MediaCache, bucket: str
) -> None:
    with lying(HEAD=always(HEAD), GET=always(WHOLE)) as liar:
        fault = fault_of(f"s3://{bucket}/photo.jpg", limits_of(liar), media_cache)
        assert liar.requests == []
    assert fault.code is ErrorCode.MEDIA_NOT_FOUND
    assert "no valid bucket" in fault.message


@pytest.mark.holds("docs/operations.md#which-media-does-a-worker-read", "A key has up to 1,024 bytes")
def test_key_too_long_for_s3_is_said_to_be_that_without_a_question(
    limits_of: Callable[[Liar], MediaLimits], media_cache: MediaCache
) -> None:
    """Bytes count, not letters."""
    with lying(HEAD=always(HEAD), GET=always(WHOLE)) as liar:
        assert fetch_one(f"s3://media/{'k' * 1024}", limits_of(liar), media_cache) == CONTENT
        del liar.requests[:]
        for key, num_bytes in (("k" * 1025, "1,025"), ("ä" * 513, "1,026")):
            fault = fault_of(f"s3://media/{key}", limits_of(liar), media_cache)
            assert fault.code is ErrorCode.MEDIA_NOT_FOUND
            assert f"a key of {num_bytes} bytes, and no key of S3 has over 1,024" in fault.message
        assert liar.requests == []


def test_store_is_quoted_with_a_code_and_with_nothing_else(
    limits_of: Callable[[Liar], MediaLimits], media_cache: MediaCache
) -> None:
    for code, quoted in ((b"AccessDenied", "403 AccessDenied"), (b"Evil text", "403"), (b"A" * 65, "403")):
        with lying(HEAD=always(REFUSED), GET=always(error(code))) as liar:
            fault: Fault = fault_of("s3://media/photo.jpg", limits_of(liar), media_cache)
        assert f"the store refused ({quoted})." in fault.message
