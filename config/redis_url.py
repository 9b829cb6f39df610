"""KEYE_REDIS_URL, read by one set of rules for all that connect: our clients, and both halves of Celery."""

import re
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from keye.config.primary import Primary, TcpConnection, TlsConnection, UnixConnection

SCHEMES = ("redis", "rediss", "unix", "sentinel")
HOW_TO_WRITE_URL = (
    "Write redis://:password@host:6379/0, with %40 for an @ in the password, %23 for a #, %2F for a /; or leave the "
    "password out of it and set KEYE_REDIS_PASSWORD."
)
SENTINEL_PORT = 26379
_CERTIFICATES = {f"{before}{word}": word for word in ("required", "optional", "none") for before in ("", "cert_")}


def _whole(least: int, most: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", text) or not least <= int(text) <= most:
            raise ValueError(f"a whole number from {least} to {most}")
        return int(text)

    return read


def _seconds(text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]+)?", text) or float(text) < 0.1:
        raise ValueError("seconds, 0.1 at least")
    return float(text)


def _switch(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise ValueError("true or false")
    return text.lower() in ("true", "1", "yes")


def _certificates(text: str) -> str:
    if text.lower() not in _CERTIFICATES:
        raise ValueError("required, optional or none")
    return _CERTIFICATES[text.lower()]


# What may stand behind the ?, as redis-py has it, and how each is read.
_OPTIONS: Mapping[str, Callable[[str], Any]] = {
    "db": _whole(0, 10**9 - 1),
    "username": str,
    "password": str,
    "protocol": _whole(2, 3),
    "client_name": str,
    # A reader holds one, and so does who listens for cancellations.
    "max_connections": _whole(2, 10**5),
    "timeout": _seconds,
    "socket_timeout": _seconds,
    "socket_connect_timeout": _seconds,
    "health_check_interval": _whole(0, 86400),
}
_TLS_OPTIONS: Mapping[str, Callable[[str], Any]] = {
    "ssl_cert_reqs": _certificates,
    "ssl_check_hostname": _switch,
    "ssl_ca_certs": str,
    "ssl_certfile": str,
    "ssl_keyfile": str,
    "ssl_password": str,
}
_SENTINEL_OPTIONS: Mapping[str, Callable[[str], Any]] = {
    "ssl": _switch,
    "sentinel_username": str,
    "sentinel_password": str,
}
# Of our pools alone; Celery's have bounds of their own.
_OF_POOLS = ("max_connections", "timeout")
_SECRETS = ("password", "ssl_password", "sentinel_password")


@dataclass(frozen=True, slots=True)
class RedisUrl:
    """Where Redis is and how to get in; `shown` is that without secrets, for messages."""

    connection_class: type[TcpConnection | TlsConnection | UnixConnection]
    # As redis-py's connections take them. What the URL does not say is not there.
    options: Mapping[str, Any] = field(repr=False)
    pool_options: Mapping[str, Any]
    shown: str
    host: str
    db: int
    secrets: tuple[str, ...] = field(repr=False)
    # Of each Sentinel.
    sentinels: tuple[tuple[str, int], ...] = ()
    service: str = ""
    sentinel_options: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @staticmethod
    def read(url: str) -> "RedisUrl":
        """Raises `ValueError` with a sentence about the URL, "it ...", that quotes nothing that may be a password."""
        try:
            return _read(url.strip())
        except _Refused:
            raise
        except ValueError:
            raise ValueError(f"it cannot be read. {HOW_TO_WRITE_URL}") from None

    def connection_options(self, **defaults: Any) -> dict[str, Any]:
        """What a pool of any kind is made with: connections that share what they find out about the server."""
        primary = Primary(self.sentinels, self.service, self.sentinel_options)
        keepalive = {} if self.connection_class is UnixConnection else {"socket_keepalive": True}
        return {**keepalive, **defaults, **self.options, "primary": primary}

    @property
    def has_password(self) -> bool:
        return "password" in self.options

    @property
    def is_local(self) -> bool:
        """Whether only this host gets in."""
        try:
            return self.connection_class is UnixConnection or ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def __json__(self) -> str:
        """For kombu: `inspect stats` tells the transport's options, of which this is one."""
        return self.shown


class _Refused(ValueError):
    """With a sentence of its own."""


def with_password(url: str, password: str) -> str:
    """The URL with that password in it, unless it has one. A secret."""
    scheme, mark, rest = url.partition("://")
    # Not what lies behind the place: a path or an option may hold an @ of its own.
    place, query = re.split(r"[/?#]", rest, maxsplit=1)[0], rest.partition("?")[2]
    user, at, _ = place.rpartition("@")
    if not password or ":" in user or any(name == "password" for name, _ in parse_qsl(query)):
        return url
    return f"{scheme}{mark}{user}:{quote(password, safe='')}@{rest.removeprefix(user + at)}"


def _read(url: str) -> RedisUrl:
    parts = urlsplit(url)
    if parts.scheme not in SCHEMES or not url[len(parts.scheme) :].startswith("://"):
        raise _Refused(f"its scheme is none of {', '.join(SCHEMES[:-1])} and {SCHEMES[-1]}. {HOW_TO_WRITE_URL}")
    if "#" in url or re.search(r"[\x00-\x1f]", url):
        raise ValueError
    scheme = parts.scheme
    given = _options(scheme, parts.query)
    login, _, place = parts.netloc.rpartition("@")
    username, _, password = login.partition(":")
    given = {
        **{name: unquote(value) for name, value in (("username", username), ("password", password)) if value},
        **given,
    }
    secrets = tuple(given[name] for name in _SECRETS if name in given)
    is_tls = scheme == "rediss" or given.pop("ssl", False)
    tls = {name: given.pop(name) for name in _TLS_OPTIONS if name in given}
    if is_tls:
        tls = {"ssl_cert_reqs": "required", "ssl_check_hostname": True, **tls}
        _check_certificates(tls)
    elif tls:
        cure = "Write ssl=true too" if scheme == "sentinel" else "Write rediss://"
        raise _Refused(f"its option {next(iter(tls))} is for TLS, which it does not ask for. {cure}, or leave it out.")
    pool_options = {name: given.pop(name) for name in _OF_POOLS if name in given}
    sentinel_login = {
        name: given.pop(f"sentinel_{name}") for name in ("username", "password") if f"sentinel_{name}" in given
    }
    options = {**given, **tls}
    if scheme == "unix":
        if place or len(parts.path) < 2:
            raise _Refused("it names no socket by its whole path. Write unix:///run/redis.sock?db=0.")
        path = unquote(parts.path)
        shown = f"unix://{path}"
        options |= {"path": path}
        return RedisUrl(UnixConnection, options, pool_options, shown, "localhost", options.get("db", 0), secrets)
    connection_class = TlsConnection if is_tls else TcpConnection
    hosts = place.split(",")
    if scheme == "sentinel":
        name, _, database = parts.path.removeprefix("/").partition("/")
        if not name or not all(hosts):
            raise _Refused(
                "it does not name the Sentinels and the service that they watch. Write sentinel://host1,host2/name/0."
            )
        sentinels = tuple((host, port or SENTINEL_PORT) for host, port in map(_host, hosts))
        options |= _database(database, options)
        who = ",".join(f"{_bracketed(host)}:{port}" for host, port in sorted(sentinels))
        service = unquote(name)
        # In place of a host, which is found out later: errors name it, and outcomes are kept on disk for it.
        options |= {"host": f"{who}/{service}"}
        shown = f"sentinel://{who}/{service}/{options.get('db', 0)}"
        sentinel_options = {**sentinel_login, **tls, **({"ssl": True} if is_tls else {})}
        arguments = (options.get("db", 0), secrets, sentinels, service, sentinel_options)
        return RedisUrl(connection_class, options, pool_options, shown, sentinels[0][0], *arguments)
    if len(hosts) > 1:
        raise _Refused("it names several hosts. Write the address of one server, or sentinel://host1,host2/name/0.")
    host, port = _host(place)
    options |= _database(parts.path.removeprefix("/"), options)
    options |= {name: value for name, value in (("host", host), ("port", port)) if value}
    shown = f"{scheme}://{_bracketed(host or 'localhost')}:{port or 6379}/{options.get('db', 0)}"
    return RedisUrl(connection_class, options, pool_options, shown, host or "localhost", options.get("db", 0), secrets)


def _options(scheme: str, query: str) -> dict[str, Any]:
    """Names are quoted only where they are known: who left an ? in a password has it among them."""
    known = {**_OPTIONS, **({} if scheme == "unix" else _TLS_OPTIONS)}
    known |= _SENTINEL_OPTIONS if scheme == "sentinel" else {}
    found: dict[str, Any] = {}
    for name, value in parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)):
        if name not in known:
            raise _Refused(f"it has an option that is unknown for {scheme}://; known are {', '.join(known)}.")
        if name in found:
            raise _Refused(f"it has its option {name} twice. Leave one out.")
        if not value:
            raise _Refused(f"its option {name} is empty. Give it a value, or leave it out.")
        try:
            found[name] = known[name](value)
        except ValueError as wanted:
            raise _Refused(f"its option {name} is none: it wants {wanted}.") from None
    return found


def _host(place: str) -> tuple[str, int | None]:
    parts = urlsplit(f"//{place}")
    host, port = unquote(parts.hostname or ""), parts.port
    if port == 0 or place.endswith(":"):
        raise ValueError
    if ":" in host:
        ip_address(host)
    elif not re.fullmatch(r"[\w.-]*", host):
        raise ValueError
    return host, port


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _database(path: str, options: Mapping[str, Any]) -> dict[str, int]:
    if not path:
        return {}
    if not re.fullmatch(r"[0-9]{1,9}", path):
        raise _Refused(f"its database is no number. {HOW_TO_WRITE_URL}")
    if options.get("db", int(path)) != int(path):
        raise _Refused("it names two databases, by its path and by its option db. Leave one out.")
    return {"db": int(path)}


def _check_certificates(tls: Mapping[str, Any]) -> None:
    """Before anything connects: a file that is none would look like a server that is away."""
    for name in ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile"):
        if name in tls and not Path(tls[name]).exists():
            raise _Refused(f"its option {name} names nothing that is there. Correct the path.")
    if "ssl_keyfile" in tls and "ssl_certfile" not in tls:
        raise _Refused("it has ssl_keyfile without ssl_certfile. Name the certificate of that key, too.")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        if "ssl_ca_certs" in tls:
            context.load_verify_locations(tls["ssl_ca_certs"])
    except OSError:
        raise _Refused("its option ssl_ca_certs names no file of certificates that can be read.") from None
    try:
        if "ssl_certfile" in tls:
            # Without a password OpenSSL would ask for one on the terminal.
            context.load_cert_chain(tls["ssl_certfile"], tls.get("ssl_keyfile"), lambda: tls.get("ssl_password", ""))
    except OSError:
        raise _Refused(
            "its ssl_certfile and ssl_keyfile hold no certificate with its key, or ssl_password does not open it."
        ) from None
