"""Takes what is secret out of text that is written for operators: what this process knows, and what looks like it."""

import os
import re
from collections.abc import Callable, Iterator
from urllib.parse import quote, unquote

from pydantic import SecretStr

from keye.config.settings import Settings

HIDDEN = "***"
# A shorter one is hidden where it stands in a URL; anywhere else it would blot out what has nothing to do with it.
MIN_SECRET_CHARS = 8

_SECRET_NAMES = r"authorization|x-amz-security-token|secret_?access_?key|session_?token|access_?key_?id"
_LOOKS_SECRET = [
    # User and password of a URL. Bounded, as is the next: else a line of many URLs would take the square of its length.
    (r"(\w://)[^\s/\"'<>]{1,999}@", rf"\1{HIDDEN}@"),
    # With a slash in the password, which is wrong, and there all the same; what is behind a port is none.
    (r"(\w://)[^\s/\"'<>:]{0,99}:(?!\d{1,5}(?:/|$))[^\s\"'<>]{1,999}@", rf"\1{HIDDEN}@"),
    # Queries sign URLs, in many ways.
    (r"(?<=\S)\?[^\s\"'<>?=]+=[^\s\"'<>]*", f"?{HIDDEN}"),
    # Headers and options, as they are, in a mapping or in XML.
    (rf"(?i)((?:{_SECRET_NAMES})[\"']?\s*[:=]\s*)(?:b?\"[^\"]*\"|b?'[^']*'|[^\s\"'][^\r\n]*)", rf"\1{HIDDEN}"),
    (rf"(?i)(<\w*(?:{_SECRET_NAMES})>)[^<]*", rf"\1{HIDDEN}"),
    (r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b", HIDDEN),
]


def redaction(settings: Settings) -> Callable[[str], str]:
    """What gives any text without secrets: those of the settings and of AWS in the environment, however escaped."""
    known = {form for secret in _secrets(settings) for form in (secret, quote(secret, safe=""), repr(secret)[1:-1])}
    longest_first = sorted((form for form in known if len(form) >= MIN_SECRET_CHARS), key=len, reverse=True)
    patterns = [("|".join(map(re.escape, longest_first)), HIDDEN)] * bool(longest_first) + _LOOKS_SECRET
    replacements = [(re.compile(pattern), by) for pattern, by in patterns]

    def redact(text: str) -> str:
        for pattern, by in replacements:
            text = pattern.sub(by, text)
        return text

    return redact


def _secrets(settings: Settings) -> Iterator[str]:
    yield from (os.environ.get(f"AWS_{name}", "") for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN"))
    for _, value in settings:
        if isinstance(value, SecretStr):
            secret = value.get_secret_value()
            # Of a URL its password, raw or escaped.
            is_url, at = secret.partition("://")[2], secret.rpartition("@")[0]
            password = at.partition("://")[2].partition(":")[2] if is_url else secret
            yield from (password, unquote(password))
