"""What a log must not hold, in the forms in which libraries write it; and what is none of it stays."""

import json
import time
from urllib.parse import quote

import pytest
from pydantic import SecretStr

from keye.config.settings import Settings
from keye.worker.telemetry.redaction import redaction

PASSWORD = "p@s:s/w#o%41r\"d\\ &é'"
AWS_SECRET = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"


@pytest.mark.holds(
    "docs/operations.md#what-does-the-log-say",
    "Passwords in URLs, `KEYE_REDIS_PASSWORD`, AWS keys and session tokens",
)
@pytest.mark.parametrize(
    ("text", "without"),
    [
        ("cannot reach redis://:short@cache:6379/0: refused", "cannot reach redis://***@cache:6379/0: refused"),
        ("amqp://me:a/b@c@cache/1", "amqp://***@cache/1"),
        ("https://token@host/a.png is gone", "https://***@host/a.png is gone"),
        ("GET 'https://a.b/c.png?X-Amz-Signature=0f&Expires=1': 403", "GET 'https://a.b/c.png?***': 403"),
        ("(Caused by url: /c.png?versionId=1&sig=0f)", "(Caused by url: /c.png?***"),
        ("Authorization: Bearer one two\nAccept: *", "Authorization: ***\nAccept: *"),
        ("{'Authorization': b'AWS4 0f', 'Accept': '*'}", "{'Authorization': ***, 'Accept': '*'}"),
        ('{"x-amz-security-token": "0f", "Accept": "*"}', '{"x-amz-security-token": ***, "Accept": "*"}'),
        ("client(aws_session_token=of-mine)", "client(aws_session_token=***"),
        ("<AWSAccessKeyId>mine</AWSAccessKeyId>", "<AWSAccessKeyId>***</AWSAccessKeyId>"),
        ("no key AKIAIOSFODNN7EXAMPLE here", "no key *** here"),
        (f"signed with {AWS_SECRET}.", "signed with ***."),
        (f"AUTH {PASSWORD}.", "AUTH ***."),
        (f"AUTH {PASSWORD!r}.", "AUTH '***'."),
        (f"AUTH {PASSWORD!a}.", "AUTH '***'."),
        (f"AUTH {repr(PASSWORD)!r}.", "AUTH '\\'***\\''."),
        (f"AUTH {json.dumps(PASSWORD)}.", 'AUTH "***".'),
        (f"{f'AUTH {PASSWORD}'.encode()!r}.", "b'AUTH ***'."),
        (f"AUTH {quote(PASSWORD).lower()}.", "AUTH ***."),
        (
            "[('Authorization', 'AWS4 0f'), (b'authorization', b'AWS4 0f')]",
            "[('Authorization', ***), (b'authorization', ***)]",
        ),
        ("{'Authorization': 'it\\'s mine'}", "{'Authorization': ***}"),
        ('{\\"Authorization\\": \\"Bearer 0f\\"}', '{\\"Authorization\\": ***}'),
        ("Authorization='Bearer cut off", "Authorization=***"),
        (
            "ReadOnlyCredentials(access_key='a', secret_key='b', token='c')",
            "ReadOnlyCredentials(access_key=***, secret_key=***, token=***",
        ),
        ("Connection(password='short', db=0)", "Connection(password=***, db=0"),
        ("('s3', '/a.png', 'X-Amz-Signature=0f')", "('s3', '/a.png', 'X-Amz-Signature=***"),
        ("to=https%3A%2F%2Fb%2Fc%3FX-Amz-Signature%3D0f", "to=https%3A%2F%2Fb%2Fc%3FX-Amz-Signature%3D***"),
        ("redis://:p%40s%3As%2Fw%23o%2541r%22d%5C%20%26%C3%A9%27", "redis://:***"),
    ],
)
def test_a_secret_is_hidden(text: str, without: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", AWS_SECRET)
    settings = Settings(redis_password=SecretStr(PASSWORD))
    assert redaction(settings)(text).rstrip(")") == without.rstrip(")")


def test_a_password_within_the_url_is_hidden_however_it_is_escaped() -> None:
    redact = redaction(Settings(redis_url=SecretStr("redis://me:long%20enough@cache:6379/0")))
    assert redact("long%20enough, long enough") == "***, ***"


@pytest.mark.holds(
    "docs/operations.md#what-does-the-log-say",
    "Of a password of fewer than 8 characters only that and URLs are known.",
)
@pytest.mark.parametrize("password", ["a b", "a'b", "<a>"])
def test_a_short_password_is_hidden_in_its_url_whatever_it_holds(password: str) -> None:
    url = f"redis://me:{password}@cache:6379/0"
    assert (
        redaction(Settings(redis_url=SecretStr(url)))(f"cannot reach {url}") == "cannot reach redis://***@cache:6379/0"
    )


@pytest.mark.parametrize("part", ["x://", "x://a:", "a?b=", "authorization:'", "authorization", "\\", "<a", "a_", " "])
def test_a_long_line_takes_no_longer_than_its_length(part: str) -> None:
    redact = redaction(Settings(redis_password=SecretStr(PASSWORD)))

    def seconds(num_chars: int) -> float:
        text = part * (num_chars // len(part))
        began = time.thread_time()
        redact(text)
        return time.thread_time() - began

    # Its square would be 256 times as long.
    assert seconds(320_000) < 64 * max(seconds(20_000), 0.001)


@pytest.mark.parametrize(
    "text",
    [
        "job 1: MEDIA_NOT_FOUND: 's3://bucket/folder/cat@2x.png: no such object.'",
        "http://store:9000/bucket/cat@2x.png",
        "Connected to redis://cache:6379/0",
        "keye-cpu-12@host ready.",
        "is it? x=1",
        "invalid username-password pair or user is disabled.",
        "KEYE_REDIS_PASSWORD: the URL has one, too",
        "{'prompt_tokens': 5, 'tokens': 3}",
        "test",
    ],
)
def test_all_else_stays(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # As tests and local stores have it: no secret, and a word like others.
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    assert redaction(Settings())(text) == text
