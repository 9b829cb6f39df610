"""Names of hosts, each in one spelling, and whether a list of them has one."""

import ipaddress
import re
from collections.abc import Sequence

_LABEL = r"(?!-)[a-z\d_-]{1,63}(?<!-)"
# Its last label is no number: whoever lists `*.1` would list addresses.
_NAME = re.compile(rf"({_LABEL}\.)*(?!\d+$){_LABEL}")


def plain_host(host: str) -> str:
    """As it is looked up: in lower case, in the letters of DNS, without a last dot. Raises `ValueError`."""
    return host.encode("idna").decode().lower().removesuffix(".")


def listed_host(entry: str) -> str:
    """One of an operator's list as `is_listed` takes it: a name, an address or, as `*.name`, all names below one.

    Raises `ValueError`, which says what to write.
    """
    host = re.sub(r"^https://([^/]*)/?$", r"\1", entry, flags=re.IGNORECASE)
    try:
        return _address(host.strip("[]"))
    except ValueError:
        pass
    try:
        name = plain_host(host.removeprefix("*."))
        if not _NAME.fullmatch(name):
            raise ValueError
    except ValueError:
        raise ValueError(
            f"{entry!r} is no host. Write names without port or path: media.example.com,*.cdn.example.com."
        ) from None
    return f"*.{name}" if host.startswith("*.") else name


def is_listed(host: str, hosts: Sequence[str]) -> bool:
    """Of a `host` as `plain_host` and a URL give it, `hosts` as `listed_host` does."""
    try:
        host = _address(host)
    except ValueError:
        # A name has others above it, an address has not.
        if any(entry.startswith("*.") and host.endswith(entry[1:]) for entry in hosts):
            return True
    return host in hosts


def _address(text: str) -> str:
    return str(ipaddress.ip_address(text))
