"""A store that tells lies costs who uploads to it, and the doctor who looks at it, no more than a sentence."""

import os
import resource
import time
from collections.abc import Iterator

import pytest
from pydantic import SecretStr

from keye.config import bounded_s3
from keye.config.settings import Settings
from keye.producer import Client, UploadFailed
from keye.worker.daemon.findings import Severity
from keye.worker.daemon.trials import check_s3
from tests.support.liar import Answer, answer, endlessly, lying

CHUNK = b"100000\r\n" + b"<" * 2**20 + b"\r\n"
LONG_CODE = b"<Error><Code>%s</Code></Error>" % (b"A" * 1000)
EVIL_CODE = b"<Error><Code>Evil \n&#27; text</Code></Error>"

LIES: dict[str, Answer] = {
    "an endless error": endlessly(answer("403 Forbidden", "Transfer-Encoding: chunked"), CHUNK),
    "an endless answer": endlessly(answer("200 OK", "Transfer-Encoding: chunked"), CHUNK),
    "a long code": lambda: answer("403 Forbidden", f"Content-Length: {len(LONG_CODE)}", body=LONG_CODE),
    "a code of lines": lambda: answer("403 Forbidden", f"Content-Length: {len(EVIL_CODE)}", body=EVIL_CODE),
    "a page": lambda: answer("200 OK", "Content-Length: 6", body=b"<html>"),
    "a bare 301": lambda: answer("301 Moved", "Content-Length: 0"),
    "no HTTP": lambda: b"hello",
    "drops": endlessly(b"HTTP/1.1 200 OK\r\nx: ", b"a", 0.05),
}


@pytest.fixture(autouse=True)
def bounds(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A tenth of the time, which nobody here waits for; and no more memory than before, but for what clients take."""
    for name, value in {"ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setattr(bounded_s3, "_MAX_SECONDS", 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 150 * 2**10


@pytest.mark.parametrize("lie", [lie for lie in LIES if lie != "a page" and lie != "an endless answer"])
@pytest.mark.parametrize("num_bytes", [2 * 2**20, 9 * 2**20], ids=["at once", "in parts"])
def test_upload_to_a_store_that_lies_fails_with_a_sentence(redis_url: str, lie: str, num_bytes: int) -> None:
    photo = b"\xff\xd8\xff" + os.urandom(num_bytes)
    with lying(PUT=LIES[lie], POST=LIES[lie], HEAD=LIES[lie], DELETE=LIES[lie]) as liar:
        settings = Settings(redis_url=SecretStr(redis_url), s3_endpoint_url=liar.url, upload_prefix="s3://uploads/")
        with Client(settings) as client, pytest.raises(UploadFailed) as caught:
            client.submit(prompt="?", media=[photo])
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 350


@pytest.mark.parametrize("lie", LIES)
def test_doctor_tells_of_a_store_that_lies(lie: str) -> None:
    with lying(GET=LIES[lie], HEAD=LIES[lie]) as liar:
        began_at = time.monotonic()
        finding = check_s3(liar.url)
        assert time.monotonic() - began_at < 20
    # One that may not list buckets may be right for all else.
    assert finding.severity is Severity.WARNING or "may not list buckets" in finding.found
    assert finding.found.isprintable()
    assert len(finding.found) < 300
