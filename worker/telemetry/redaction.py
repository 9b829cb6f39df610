"""Takes what is secret out of text that is written for operators: what this process knows, and what looks like it."""

import json
import os
import re
from collections.abc import Callable, Iterator
from itertools import groupby
from urllib.parse import quote

from keye.config.redis_url import RedisUrl
from keye.config.settings import Settings

HIDDEN = "***"
# Of one text, such as a traceback; journald cuts lines at 48 KiB, and half an object is none.
MAX_CHARS = 32_000
# A shorter one is hidden where it stands in a URL; anywhere else it would blot out what has nothing to do with it.
MIN_SECRET_CHARS = 8

# Of headers and options: what follows is secret, in prose too.
_SECRET_NAMES = (
    r"authorization|x-amz-(?:security-token|signature|credential)"
    r"|secret_?(?:access_?)?key|access_?key(?:_?id)?|session_?token"
)
_VALUE = r"b?\\+[\"'][^\"']*[\"']|b?\"(?:[^\"\\]|\\.)*\"|b?'(?:[^'\\]|\\.)*'"
_LOOKS_SECRET = [
    # User and password of a URL. Bounded, as is the next: else a line of many URLs would take the square of its length.
    (r"(\w://)[^\s/\"'<>]{1,999}@", rf"\1{HIDDEN}@"),
    # With a slash in the password, which is wrong, and there all the same; what is behind a port is none.
    (r"(\w://)[^\s/\"'<>:]{0,99}:(?!\d{1,5}(?:/|$))[^\s\"'<>]{1,255}@", rf"\1{HIDDEN}@"),
    # Queries sign URLs, in many ways.
    (r"(?<=\S)\?[^\s\"'<>?=]+=[^\s\"'<>]*", f"?{HIDDEN}"),
    # Headers and options, as they are, in a mapping, in pairs or in XML.
    (
        rf"(?i)((?:{_SECRET_NAMES})(?:\\*[\"']\s*[:,]|\s*(?:[:=]|%3D))\s*)(?:{_VALUE}|[^\r\n]*)",
        rf"\1{HIDDEN}",
    ),
    # These words are in prose as well, where no value follows.
    (rf"(?i)((?:password|token)(?:\\*[\"']\s*:|=)\s*)(?:{_VALUE}|[^\s,;)}}]+)", rf"\1{HIDDEN}"),
    (rf"(?i)(<\w*(?:{_SECRET_NAMES})>)[^<]*", rf"\1{HIDDEN}"),
    (r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b", HIDDEN),
]


def redaction(settings: Settings) -> Callable[[str], str]:
    """What gives any text without secrets: those of the settings and of AWS in the environment, however escaped.

    A long one is given without its middle.
    """
    longest_first = sorted({*_secrets(settings)} - {""}, key=len, reverse=True)
    known = "|".join(
        _however_escaped(secret) if len(secret) >= MIN_SECRET_CHARS else rf"(?<=:){_however_escaped(secret)}(?=@)"
        for secret in longest_first
    )
    patterns = [(known, HIDDEN)] * bool(known) + _LOOKS_SECRET
    replacements = [(re.compile(pattern), by) for pattern, by in patterns]

    def redact(text: str) -> str:
        for pattern, by in replacements:
            text = pattern.sub(by, text)
        num_over, half = len(text) - MAX_CHARS, MAX_CHARS // 2
        return text if num_over <= 0 else f"{text[:half]}... ({num_over} characters) ...{text[-half:]}"

    return redact


def _however_escaped(secret: str) -> str:
    """A pattern of the secret in a URL, in JSON and in what Python makes of text and bytes, also of one in another."""
    return "".join(_escaped(char, len(list(same))) for char, same in groupby(secret))


def _escaped(char: str, times: int) -> str:
    if char.isascii() and char.isalnum():
        return char * times
    if char == "\\":
        # In one: repeats side by side would try each way to share them.
        return rf"(?:\\{{{times},{16 * times}}}|(?i:%5C){{{times}}})"
    as_bytes = char.encode(errors="backslashreplace")
    written = {json.dumps(char)[1:-1], ascii(char)[1:-1], repr(as_bytes)[2:-1], quote(as_bytes, safe="")}
    escaped = "|".join(re.escape(form).replace(r"\\", r"\\{1,16}") for form in sorted(written))
    return rf"(?:\\{{0,16}}{re.escape(char)}|(?i:{escaped})){{{times}}}"


def _secrets(settings: Settings) -> Iterator[str]:
    yield from (os.environ.get(f"AWS_{name}", "") for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN"))
    yield from RedisUrl.read(settings.redis_url.get_secret_value()).secrets
    if settings.redis_password:
        yield settings.redis_password.get_secret_value()
