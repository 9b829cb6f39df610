"""Who a URL of Redis logs in as."""

import re
from urllib.parse import urlsplit


def log_in(url: str, login: str) -> str:
    """The URL with this user, or user:password, in place of its own."""
    return re.sub("^redis://([^/@]*@)?", f"redis://{login}@", url)


def at_port(url: str, port: int) -> str:
    """The URL of another port of this host, with the same login."""
    return url.replace(f":{urlsplit(url).port}/", f":{port}/")
