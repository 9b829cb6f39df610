"""However an address is spelt, nothing that is not on the public internet is connected to."""

import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from keye.config.codes import ErrorCode
from keye.config.faults import Fault
from keye.config.job import ImagePart
from keye.config.settings import Settings
from keye.worker.media.fetch.address import is_public
from keye.worker.media.job_media import MediaCache, MediaLimits, fetch

PUBLIC = "93.184.215.14"

# What names mean here, since tests ask no name server. A list is the answers in turn, the last for ever.
NAMES: dict[str, list[tuple[str, ...]]] = {
    "metadata.google.internal": [("169.254.169.254",)],
    "instance-data.ec2.internal": [("fd00:ec2::254",)],
    "127.0.0.1.nip.io": [("127.0.0.1",)],
    "intranet.example": [("10.1.2.3",)],
    "six.example": [("::1",)],
    "both.example": [(PUBLIC, "127.0.0.1")],
    "azure.example": [("168.63.129.16",)],
}

# Each with the port of a listener on all addresses of this machine.
REFUSED = [
    # Loopback in every spelling that resolvers read.
    "https://127.0.0.1:{port}/",
    "https://127.1:{port}/",
    "https://127.0.1:{port}/",
    "https://2130706433:{port}/",
    "https://017700000001:{port}/",
    "https://0177.0.0.1:{port}/",
    "https://0x7f000001:{port}/",
    "https://0x7f.1:{port}/",
    "https://127.000.000.001:{port}/",
    "https://127.255.255.254:{port}/",
    "https://localhost:{port}/",
    "https://LOCALHOST.:{port}/",
    "https://①②⑦.⓪.⓪.①:{port}/",
    "https://127。0。0。1:{port}/",
    "https://0.0.0.0:{port}/",
    "https://0:{port}/",
    "https://[::1]:{port}/",
    "https://[0:0:0:0:0:0:0:1]:{port}/",
    "https://[::]:{port}/",
    # IPv4 inside IPv6.
    "https://[::ffff:127.0.0.1]:{port}/",
    "https://[::ffff:7f00:1]:{port}/",
    "https://[::127.0.0.1]:{port}/",
    "https://[64:ff9b::127.0.0.1]:{port}/",
    "https://[2002:7f00:1::]:{port}/",
    # Link-local, metadata and private ones.
    "https://169.254.169.254:{port}/latest/meta-data/",
    "https://0xa9fea9fe:{port}/",
    "https://[fe80::1%25lo]:{port}/",
    "https://[fd00:ec2::254]:{port}/",
    "https://100.100.100.200:{port}/",
    "https://192.0.0.192:{port}/",
    "https://10.0.0.1:{port}/",
    "https://172.31.255.255:{port}/",
    "https://192.168.0.1:{port}/",
    "https://255.255.255.255:{port}/",
    "https://224.0.0.1:{port}/",
    *(f"https://{name}:{{port}}/" for name in NAMES),
    # Who is meant depends on who reads.
    "https://user@127.0.0.1:{port}/",
    "https://example.com@127.0.0.1:{port}/",
    "https://127.0.0.1:{port}\\@example.com/",
    "https://127.0.0.1:{port}\t/",
    "https://[::1:{port}/",
    "https:127.0.0.1:{port}/",
    "https:///127.0.0.1:{port}/",
]


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """On every address of this machine, of both kinds where it has them; accepts nobody by itself."""
    if socket.has_dualstack_ipv6():
        listener = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    else:
        listener = socket.create_server(("0.0.0.0", 0))
    with listener:
        listener.setblocking(False)
        yield listener


# Addresses that this process ever set out to connect to, by any road: Python tells of each before it does.
ATTEMPTS: list[tuple[Any, ...]] = []
sys.addaudithook(lambda event, args: ATTEMPTS.append(args[1]) if event == "socket.connect" else None)


def attempts_on(port: int) -> int:
    return sum(address[1:2] == (port,) for address in ATTEMPTS)


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names that were looked up. Numbers go to the real resolver, in whatever spelling."""
    asked: list[str] = []
    answers = {name: list(turns) for name, turns in NAMES.items()}
    real = socket.getaddrinfo

    def look_up(host: str, port: int, *args: Any, **options: Any) -> Any:
        if host not in answers:
            return real(host, port, *args, **options)
        asked.append(host)
        turns = answers[host]
        addresses = turns.pop(0) if len(turns) > 1 else turns[0]
        return [answer for address in addresses for answer in real(address, port, *args, **options)]

    answers["turncoat.example"] = [(PUBLIC,), ("127.0.0.1",)]
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return asked


def fault_of(uri: str, folder: Path) -> Fault:
    limits = MediaLimits.of(Settings(fetch_timeout_seconds=0.2, allow_https=True))
    with pytest.raises(Fault) as caught:
        fetch([ImagePart(uri=uri)], limits, MediaCache(folder, 0))
    return caught.value


def num_accepted(listener: socket.socket) -> int:
    count = 0
    while True:
        try:
            accepted, _ = listener.accept()
        except BlockingIOError:
            return count
        accepted.close()
        count += 1


def test_the_table_is_as_long_as_was_promised() -> None:
    assert len(REFUSED) >= 40


@pytest.mark.holds("docs/operations.md#which-media-does-a-worker-read", "public addresses, looked up once")
@pytest.mark.parametrize("spelling", REFUSED)
def test_address_that_is_not_public_is_never_connected_to(
    listener: socket.socket, tmp_path: Path, spelling: str
) -> None:
    port = listener.getsockname()[1]
    before = attempts_on(port)
    fault = fault_of(spelling.format(port=port), tmp_path)
    assert fault.code in (ErrorCode.MEDIA_FORBIDDEN, ErrorCode.MEDIA_NOT_FOUND), fault.message
    assert attempts_on(port) == before
    assert num_accepted(listener) == 0


@pytest.mark.parametrize("spelling", ["https://127.1:{port}/", "https://2130706433:{port}/", "https://0:{port}/"])
def test_the_same_address_is_reached_where_nothing_guards_it(
    listener: socket.socket, tmp_path: Path, spelling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or else the table above would prove nothing."""
    monkeypatch.setattr("keye.worker.media.fetch.address.is_public", lambda _: True)
    port = listener.getsockname()[1]
    before = attempts_on(port)
    fault_of(spelling.format(port=port), tmp_path)
    assert attempts_on(port) - before == num_accepted(listener) == 1


@pytest.mark.holds("docs/operations.md#which-media-does-a-worker-read", "looked up once and connected to as looked up")
def test_name_that_changes_its_answer_is_asked_once_and_the_first_answer_dialled(
    listener: socket.socket, tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dialled = []

    def dial(address: tuple[str, int], timeout: float) -> socket.socket:
        dialled.append(address[0])
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "create_connection", dial)
    fault = fault_of(f"https://turncoat.example:{listener.getsockname()[1]}/", tmp_path)
    assert fault.code is ErrorCode.MEDIA_UNREACHABLE
    assert (asked, dialled) == (["turncoat.example"], [PUBLIC])
    # A second job asks anew, and is told the private one.
    assert fault_of("https://turncoat.example/", tmp_path).code is ErrorCode.MEDIA_FORBIDDEN
    assert dialled == [PUBLIC]
    assert num_accepted(listener) == 0


@pytest.mark.parametrize("address", [PUBLIC, "8.8.8.8", "172.32.0.1", "100.128.0.1", "2606:4700::1111", "2a00:1450::1"])
def test_public_addresses_pass(address: str) -> None:
    assert is_public(address)
