"""Media of the public web, by way of the cache. Off unless the operator allows it; which addresses: see `address`."""

import encodings.idna  # noqa: F401  # where no file can be opened it would not be found
import http.client
import os
import socket
import ssl
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import cache
from http import HTTPStatus
from typing import NamedTuple
from urllib.parse import quote, urljoin, urlsplit

from keye.config.bounded_socket import BoundedSocket
from keye.config.host_names import is_listed, plain_host
from keye.worker.host_fault import HostFault
from keye.worker.media.faults import forbidden, not_found, unreachable
from keye.worker.media.fetch.address import resolve_public
from keye.worker.media.fetch.fetched import Fetched, as_told
from keye.worker.media.fetch.lack import raise_lack
from keye.worker.media.fetch.media_cache import MediaCache
from keye.worker.media.fetch.transfer import Transfer, read_retry_after
from keye.worker.media.limits import check_size

_MAX_REDIRECTS = 3
_CHUNK_BYTES = 64 * 2**10

# RFC 3986: what a path or query may hold as it is; "%" because callers give them encoded.
_AS_IT_IS = "/?%:@!$&'()*+,;=-._~"

_REDIRECTS = {301, 302, 303, 307, 308}
_NOT_FOUND = {HTTPStatus.NOT_FOUND, HTTPStatus.GONE}
_PASSING = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS}


def fetch_web(uri: str, transfer: Transfer, media_cache: MediaCache, hosts: Sequence[str] = ()) -> Fetched:
    """Open an `https:` address, after up to three redirects, each of them checked as the first address was.

    Where there are `hosts`, as `is_listed` knows them, no other is asked.
    The file is kept where the server gives it a length and an ETag: with the address, they are its identity.
    """
    base = uri
    for _ in range(_MAX_REDIRECTS + 1):
        target = _parse(base, uri)
        if hosts and not is_listed(target.host, hosts):
            raise forbidden("its host is none of those that this worker may ask (KEYE_HTTPS_HOSTS).")
        addresses = resolve_public(target.host, target.port, transfer)
        with _connect(target, addresses, transfer) as connection:
            with _told_as_faults(transfer):
                connection.request("GET", target.path, headers=_HEADERS)
                response = connection.getresponse()
            with response:
                if response.status not in _REDIRECTS:
                    fetched = _receive(response, target, transfer, media_cache)
                    etag, last_modified = map(as_told, map(response.getheader, ("ETag", "Last-Modified")))
                    return fetched.told(etag=etag, last_modified=last_modified)
                base, uri = target.url, response.getheader("Location", "")
    raise forbidden(f"redirects over {_MAX_REDIRECTS} times. Send the last address.")


_HEADERS = {"Accept": "image/*, video/*", "Accept-Encoding": "identity", "User-Agent": "keye-worker"}


class _Target(NamedTuple):
    """`path` is what is asked for, with its query; `url` is the whole, without its fragment."""

    url: str
    host: str
    port: int
    path: str


def _parse(base: str, uri: str) -> _Target:
    try:
        whole = urljoin(base, uri)
        url = urlsplit(whole)
        host = plain_host(url.hostname or "")
        port = url.port or 443
        if url.scheme != "https" or "@" in url.netloc:
            raise forbidden("leads to a scheme other than https, or names a user; neither is read.")
        # Readers disagree on what control characters and backslashes mean, and so on which host is meant.
        if not host or not (base + uri).isprintable() or "\\" in base + uri:
            raise ValueError
    except ValueError:
        raise not_found("is no valid address. Write https://host/path.") from None
    path = quote(url.path or "/", safe=_AS_IT_IS) + (f"?{quote(url.query, safe=_AS_IT_IS)}" if url.query else "")
    return _Target(whole.partition("#")[0], host, port, path)


@contextmanager
def _connect(target: _Target, addresses: list[str], transfer: Transfer) -> Iterator[http.client.HTTPSConnection]:
    """To one of `addresses`, whatever the name means by now; asks for the name, and verifies it, all the same.

    All of it ends with the transfer's time: a timeout alone ends neither a list of silent addresses nor an answer that
    comes byte by byte.
    """
    with closing(http.client.HTTPSConnection(target.host, target.port, context=_tls())) as connection:
        with _told_as_faults(transfer):
            # A handshake takes no longer than the timeout that is left to it, however many pieces it comes in.
            wire = _tls().wrap_socket(
                _dial(addresses, target.port, transfer),
                server_hostname=target.host,
                suppress_ragged_eofs=False,  # what is cut off would pass for complete
            )
            wire.settimeout(transfer.patience_seconds)
            connection.sock = BoundedSocket(wire, lambda: transfer.go_on)
        yield connection


def _dial(addresses: list[str], port: int, transfer: Transfer) -> socket.socket:
    *others, last = addresses
    for address in others:
        with suppress(OSError):
            return _dial_one(address, port, transfer)
    return _dial_one(last, port, transfer)


def _dial_one(address: str, port: int, transfer: Transfer) -> socket.socket:
    transfer.go_on()
    wire = socket.create_connection((address, port), transfer.patience_seconds)
    wire.settimeout(transfer.patience_seconds)
    return wire


@cache
def _tls() -> ssl.SSLContext:
    """Without files OpenSSL would pass over all authorities, and trust nobody from then on: raises the host's fault."""
    context = ssl.create_default_context()
    raise_lack()
    # Those of a folder are opened as they are needed.
    if not context.cert_store_stats()["x509"] and ssl.get_default_verify_paths().capath is None:
        raise HostFault("This host has no certificates of authorities. Install ca-certificates, or set SSL_CERT_FILE.")
    return context


def _receive(
    response: http.client.HTTPResponse, target: _Target, transfer: Transfer, media_cache: MediaCache
) -> Fetched:
    _check_status(response)
    copy = _Copy(response, transfer)
    etag = response.getheader("ETag", "")
    if response.length is not None:
        check_size(response.length, transfer.max_bytes)
        # A weak ETag promises the same meaning, not the same bytes.
        if etag and not etag.startswith("W/"):
            identity = (target.url, etag, str(response.length))
            return media_cache.open(identity, response.length, copy, transfer.go_on)
    return media_cache.open_unkept(copy, response.length or 0, transfer.go_on)


def _check_status(response: http.client.HTTPResponse) -> None:
    status = response.status
    if status == HTTPStatus.OK:
        return
    if status in _NOT_FOUND:
        raise not_found(f"the server has no such file ({status}).")
    if status in _PASSING or status >= 500:
        retry_after = read_retry_after(response.getheader("Retry-After"))
        raise unreachable(f"the server answered {status}.", retry_after_seconds=retry_after)
    raise forbidden(f"the server refused ({status}). Is the address still valid?")


class _Copy:
    """Writes an answer to a file. Called again, after that was full, it goes on where it was: the answer comes once."""

    def __init__(self, response: http.client.HTTPResponse, transfer: Transfer) -> None:
        self._response = response
        self._transfer = transfer
        self._num_promised = response.length
        self._num_written = 0
        self._unwritten = b""

    def __call__(self, handle: int) -> None:
        while True:
            while self._unwritten:
                num_bytes = os.pwrite(handle, self._unwritten, self._num_written)
                self._unwritten = self._unwritten[num_bytes:]
                self._num_written += num_bytes
            with _told_as_faults(self._transfer):
                self._unwritten = self._response.read1(_CHUNK_BYTES)
                if not self._unwritten and self._num_written < (self._num_promised or 0):
                    raise ConnectionResetError
            # At the end too: nothing may have come.
            check_size(self._num_written + len(self._unwritten), self._transfer.max_bytes)
            if not self._unwritten:
                return
            self._transfer.go_on()


@contextmanager
def _told_as_faults(transfer: Transfer) -> Iterator[None]:
    """For what waits for the server and touches nothing else."""
    try:
        yield
    except ssl.SSLCertVerificationError as error:
        raise_lack(error)
        raise forbidden(f"the server cannot prove who it is ({error.verify_message}).") from None
    except (OSError, http.client.HTTPException) as error:
        raise_lack(error)
        if not transfer.seconds_left:
            raise transfer.too_slow() from None
        raise unreachable(f"the server did not answer or broke off ({type(error).__name__}).") from None
