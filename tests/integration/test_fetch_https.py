"""Media of the public web, over real TLS. Only the road there is made up: public addresses lead to a server here."""

import datetime
import hashlib
import os
import socket
import ssl
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import quote, unquote

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from keye.config.codes import ErrorCode
from keye.config.job import ImagePart
from keye.config.settings import Settings
from keye.worker.host_fault import HostFault
from keye.worker.media.fetch import https
from keye.worker.media.job_media import MediaCache, MediaLimits, fetch
from tests.support.fetching import fault_of, fetch_one
from tests.support.few_files import outcomes_with_few_files
from tests.support.mounts import mounted

PUBLIC = "93.184.215.14"
CONTENT = os.urandom(300_000)
LAST_MODIFIED = "Sat, 28 Nov 2026 00:00:00 GMT"
PHOTO = "https://media.example/photo.jpg?signature=very-secret"


class Website(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "Web"

    def do_GET(self) -> None:
        self.server.asked.append((self.headers["Host"], self.path))
        path, _, query = self.path.partition("?")
        match path.strip("/").split("/"):
            case ["redirect", left]:
                to = f"/redirect/{int(left) - 1}" if left != "1" else "/photo.jpg"
                self.answer(302, location=to)
            case ["to"]:
                self.answer(307, location=unquote(query))
            case ["status", status]:
                self.answer(int(status), **{"Retry-After": "7"})
            case ["breaks-off"]:
                self.answer(200, CONTENT[:1000], promised=len(CONTENT), etag='"1"')
            case ["chunked"]:
                self.answer_in_chunks(4)
            case ["endless"]:
                self.answer_in_chunks(10**6)
            case ["drips"]:
                self.drip()
            case ["weak"]:
                self.answer(200, CONTENT, etag='W/"1"', **{"Last-Modified": LAST_MODIFIED})
            case ["large"]:
                self.answer(200, promised=2**40, etag='"1"')
            case _:
                self.answer(200, CONTENT, etag=self.server.etag)

    def answer(self, status: int, body: bytes = b"", *, promised: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(promised or len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def answer_in_chunks(self, count: int) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for _ in range(count):
            self.wfile.write(b"%x\r\n%s\r\n" % (10_000, CONTENT[:10_000]))
        self.wfile.write(b"0\r\n\r\n")

    def drip(self) -> None:
        """A head that never ends, each byte of it in time."""
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
        while True:
            self.wfile.write(b"a")
            time.sleep(0.01)

    def log_message(self, *_: object) -> None:
        """The tests' output is not the place."""


class Web(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, certificate: Path) -> None:
        super().__init__(("127.0.0.1", 0), Website)
        self.asked: list[tuple[str, str]] = []
        self.etag = '"1"'
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._tls.load_cert_chain(certificate)

    def finish_request(self, request: Any, client_address: Any) -> None:
        try:
            with self._tls.wrap_socket(request, server_side=True) as secured:
                super().finish_request(secured, client_address)
        except OSError:
            return  # the worker had enough


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of media.example, its key beside it, signed by itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "media.example")])
    today = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(today - datetime.timedelta(days=1))
        .not_valid_after(today + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("media.example")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("certificate") / "media.example.pem"
    path.write_bytes(
        made.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return path


@pytest.fixture
def web(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    with Web(certificate) as server:

        def dial(address: tuple[str, int], timeout: float) -> socket.socket:
            assert address == (PUBLIC, 443)
            connection = socket.socket()
            connection.settimeout(timeout)
            connection.connect(server.server_address)
            return connection

        def look_up(host: str, port: int, **_: Any) -> list[Any]:
            numbers = {"media.example": PUBLIC, "impostor.example": PUBLIC, "intranet.example": "10.0.0.1"}
            try:
                address = numbers.get(host) or str(ip_address(host))
            except ValueError:
                raise socket.gaierror(socket.EAI_NONAME, "no such name") from None
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

        monkeypatch.setattr(socket, "create_connection", dial)
        monkeypatch.setattr(socket, "getaddrinfo", look_up)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        https._tls.cache_clear()
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()
        https._tls.cache_clear()


@pytest.fixture
def limits() -> MediaLimits:
    return MediaLimits.of(
        Settings(
            fetch_timeout_seconds=5,
            max_image_bytes=2**20,
            max_image_pixels=10**6,
            max_video_bytes=2**20,
            allow_https=True,
        )
    )


@pytest.fixture
def media_cache(tmp_path: Path) -> MediaCache:
    return MediaCache(tmp_path, 2**24)


def test_file_arrives_whole_and_its_query_reaches_the_server(
    web: Web, limits: MediaLimits, media_cache: MediaCache
) -> None:
    assert fetch_one(PHOTO, limits, media_cache) == CONTENT
    assert fetch_one("https://media.example/a b/ä%20.jpg#part", limits, media_cache) == CONTENT
    assert web.asked == [
        ("media.example", "/photo.jpg?signature=very-secret"),
        ("media.example", "/a%20b/%C3%A4%20.jpg"),
    ]


@pytest.mark.holds("docs/operations.md#which-media-does-a-worker-read", "only with `KEYE_ALLOW_HTTPS=true`")
@pytest.mark.usefixtures("web")
def test_without_leave_https_is_off(limits: MediaLimits, media_cache: MediaCache) -> None:
    fault = fault_of(PHOTO, replace(limits, allow_https=False), media_cache)
    assert fault.code is ErrorCode.MEDIA_FORBIDDEN
    assert "KEYE_ALLOW_HTTPS" in fault.message


@pytest.mark.holds("docs/operations.md#which-media-does-a-worker-read", "at most three redirects")
def test_three_redirects_are_followed_and_no_fourth(web: Web, limits: MediaLimits, media_cache: MediaCache) -> None:
    assert fetch_one("https://media.example/redirect/3", limits, media_cache) == CONTENT
    assert len(web.asked) == 4
    fault = fault_of("https://media.example/redirect/4", limits, media_cache)
    assert fault.code is ErrorCode.MEDIA_FORBIDDEN
    assert len(web.asked) == 8


@pytest.mark.holds("docs/operations.md#which-media-does-a-worker-read", "Proxies are not used")
@pytest.mark.usefixtures("web")
def test_proxies_are_not_used(limits: MediaLimits, media_cache: MediaCache, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert fetch_one(PHOTO, limits, media_cache) == CONTENT


@pytest.mark.holds("docs/operations.md#which-media-does-a-worker-read", "each checked again")
@pytest.mark.parametrize(
    "target",
    [
        "https://127.0.0.1/",
        "https://169.254.169.254/latest/meta-data/iam?very-secret",
        "//10.0.0.1/",
        "https://intranet.example/",
        "http://media.example/photo.jpg",
        "file:///etc/passwd",
        "https://very-secret@media.example/photo.jpg",
    ],
)
def test_redirect_is_checked_as_the_first_address_was(
    web: Web, limits: MediaLimits, media_cache: MediaCache, target: str
) -> None:
    fault = fault_of(f"https://media.example/to?{target}", limits, media_cache)
    assert fault.code is ErrorCode.MEDIA_FORBIDDEN
    # Where the redirect leads is not the caller's to see.
    assert fault.message.startswith("https://media.example/to: ")
    assert len(web.asked) == 1


@pytest.mark.usefixtures("web")
@pytest.mark.parametrize(
    "target",
    [
        *("https://[/photo.jpg", "https://[x]/photo.jpg", "//[", "https://a..b/", f"https://{'x' * 64}.example/"),
        *(
            "https://media.example:port/",
            "https://media.example:99999/",
            "https://med\0ia.example/",
            "https://xn--\u00e9/",
        ),
    ],
)
def test_redirect_to_what_is_no_address_is_not_found(limits: MediaLimits, media_cache: MediaCache, target: str) -> None:
    fault = fault_of(f"https://media.example/to?{quote(target.encode())}", limits, media_cache)
    assert fault.code is ErrorCode.MEDIA_NOT_FOUND


def test_server_that_cannot_prove_its_name_is_forbidden(web: Web, limits: MediaLimits, media_cache: MediaCache) -> None:
    fault = fault_of("https://impostor.example/photo.jpg", limits, media_cache)
    assert fault.code is ErrorCode.MEDIA_FORBIDDEN
    assert "prove" in fault.message
    assert web.asked == []


@pytest.mark.usefixtures("web")
@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("status/404", ErrorCode.MEDIA_NOT_FOUND),
        ("status/410", ErrorCode.MEDIA_NOT_FOUND),
        ("status/401", ErrorCode.MEDIA_FORBIDDEN),
        ("status/403", ErrorCode.MEDIA_FORBIDDEN),
        ("status/206", ErrorCode.MEDIA_FORBIDDEN),
        ("status/429", ErrorCode.MEDIA_UNREACHABLE),
        ("status/503", ErrorCode.MEDIA_UNREACHABLE),
        ("breaks-off", ErrorCode.MEDIA_UNREACHABLE),
        ("large", ErrorCode.MEDIA_TOO_LARGE),
        ("endless", ErrorCode.MEDIA_TOO_LARGE),
    ],
)
def test_bad_answer_has_its_code_and_leaves_nothing(
    limits: MediaLimits, media_cache: MediaCache, tmp_path: Path, path: str, code: ErrorCode
) -> None:
    assert fault_of(f"https://media.example/{path}?very-secret", limits, media_cache).code is code
    assert not [found for found in tmp_path.glob("*/*") if found.is_file()]


@pytest.mark.usefixtures("web")
def test_server_that_is_busy_says_when_to_come_back(limits: MediaLimits, media_cache: MediaCache) -> None:
    fault = fault_of("https://media.example/status/503", limits, media_cache)
    assert fault.code is ErrorCode.MEDIA_UNREACHABLE
    assert fault.retry_after_seconds == 7


@pytest.mark.usefixtures("web")
def test_host_that_does_not_exist_is_not_found(limits: MediaLimits, media_cache: MediaCache) -> None:
    assert fault_of("https://absent.example/photo.jpg", limits, media_cache).code is ErrorCode.MEDIA_NOT_FOUND


@pytest.mark.usefixtures("web")
def test_answer_that_comes_byte_by_byte_ends_in_time(limits: MediaLimits, media_cache: MediaCache) -> None:
    started_at = time.monotonic()
    fault = fault_of("https://media.example/drips", replace(limits, max_fetch_seconds=0.3), media_cache)
    assert time.monotonic() - started_at < 5
    assert fault.code is ErrorCode.MEDIA_UNREACHABLE
    assert "KEYE_MAX_FETCH_SECONDS" in fault.message


@pytest.mark.holds(
    "docs/operations.md#what-lies-in-the-cache-folder-and-may-i-delete-it",
    "`https://` files are kept by address, ETag and length",
)
def test_file_is_kept_for_as_long_as_its_server_calls_it_the_same(
    web: Web, limits: MediaLimits, media_cache: MediaCache, tmp_path: Path
) -> None:
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: fetch_one(PHOTO, limits, media_cache), range(8))) == {CONTENT}
    assert len(list((tmp_path / "whole").iterdir())) == 1
    web.etag = '"2"'
    assert fetch_one(PHOTO, limits, media_cache) == CONTENT
    assert len(list((tmp_path / "whole").iterdir())) == 2


@pytest.mark.holds("docs/operations.md#what-lies-in-the-cache-folder-and-may-i-delete-it", "not at all without these")
@pytest.mark.usefixtures("web")
@pytest.mark.parametrize(("path", "content"), [("chunked", CONTENT[:10_000] * 4), ("weak", CONTENT)])
def test_file_without_length_or_firm_etag_is_read_and_not_kept(
    limits: MediaLimits, media_cache: MediaCache, tmp_path: Path, path: str, content: bytes
) -> None:
    assert fetch_one(f"https://media.example/{path}", limits, media_cache) == content
    assert not list((tmp_path / "whole").iterdir())


def test_answer_of_unknown_length_goes_on_once_a_full_disk_has_room(
    web: Web, limits: MediaLimits, tmp_path: Path
) -> None:
    with mounted(tmp_path / "disk", 2**20):
        media_cache = MediaCache(tmp_path / "disk" / "cache", 2**24)
        assert fetch_one(PHOTO, limits, media_cache) == CONTENT
        free = os.statvfs(tmp_path / "disk").f_bavail * 4096
        (tmp_path / "disk" / "filler").write_bytes(bytes(free - 20_000))
        assert fetch_one("https://media.example/chunked", limits, media_cache) == CONTENT[:10_000] * 4
        assert len(web.asked) == 2
        assert not list((tmp_path / "disk" / "cache" / "whole").iterdir())


@pytest.mark.parametrize("is_cold", [True, False])
def test_without_files_to_open_the_host_is_to_blame_and_not_the_server(web: Web, tmp_path: Path, is_cold: bool) -> None:
    """Also not its certificate: the authorities are read from a file."""
    settings = {"web_port": web.server_port, "allow_https": True}
    outcomes = outcomes_with_few_files(PHOTO, tmp_path, is_cold=is_cold, **settings)
    assert outcomes[0] == "host"
    assert outcomes[-1] == CONTENT.hex()
    assert set(outcomes) == {"host", CONTENT.hex()}


def test_host_without_authorities_is_to_blame_and_not_the_server(
    web: Web, limits: MediaLimits, media_cache: MediaCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere.pem")
    monkeypatch.setenv("SSL_CERT_DIR", "/nowhere")
    with pytest.raises(HostFault, match="no certificates of authorities"):
        fetch_one(PHOTO, limits, media_cache)
    assert web.asked == []


@pytest.mark.usefixtures("web")
def test_what_a_server_sends_is_told_by_its_digest_and_what_the_server_says(
    limits: MediaLimits, media_cache: MediaCache
) -> None:
    uris = {PHOTO: ('"1"', None), "https://media.example/weak": ('W/"1"', LAST_MODIFIED)}
    for uri, told in uris.items():
        (medium,) = fetch([ImagePart(uri=uri)], limits, media_cache)
        medium.close()
        seen = medium.identity
        assert (seen.num_bytes, seen.sha256) == (len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
        assert (seen.etag, seen.last_modified) == told
