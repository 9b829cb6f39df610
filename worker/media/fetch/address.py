"""Which internet addresses may be dialled: public ones, looked up once. Dialling itself lives in `https`."""

import ipaddress
import socket
from functools import partial

from keye.worker.media.faults import forbidden, not_found, unreachable
from keye.worker.media.fetch.lack import raise_lack
from keye.worker.media.fetch.transfer import Transfer
from keye.worker.media.side_by_side import do_side_by_side

# Python's own `is_global` differs between its releases, so the IANA special-purpose registries are written out here.
_NOT_PUBLIC = tuple(
    ipaddress.ip_network(network)
    for network in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # behind a provider's NAT; Alibaba's metadata
        "127.0.0.0/8",  # loopback
        "168.63.129.16/32",  # Azure's host, by a public address
        "169.254.0.0/16",  # link-local; metadata of most clouds
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocol assignments; Oracle's metadata
        "192.0.2.0/24",  # documentation
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",  # private
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, broadcast
        "2001::/23",  # protocol assignments, Teredo
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4: leads to an IPv4 address
        "3fff::/20",  # documentation
    )
)
# All that is handed out. Loopback, link-local, unique-local and the forms that hold an IPv4 address lie outside.
_UNICAST_6 = ipaddress.ip_network("2000::/3")


def resolve_public(host: str, port: int, transfer: Transfer) -> list[str]:
    """The IP addresses of `host`, in the resolver's order; connect to one of these, never to the name.

    A resolver that hangs holds up nobody beyond the transfer's end: it is left to its thread. One address that is not
    public spoils the answer: nobody who means well mixes them.
    """
    try:
        # The resolver reads every spelling that a connection would: 127.1, 0x7f000001, 017700000001, 2130706433.
        look_up = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
        (answers,) = do_side_by_side([lambda _: look_up()], 1, transfer.go_on, lambda _: None)
    except socket.gaierror as error:
        raise_lack(error)
        if error.errno == socket.EAI_AGAIN:
            raise unreachable("its host cannot be looked up now.") from None
        raise not_found("there is no such host.") from None
    except (UnicodeError, ValueError):
        raise not_found("is no valid host name.") from None
    addresses = [str(answer[4][0]) for answer in answers]
    if not all(is_public(address) for address in addresses):
        raise forbidden("its host is not on the public internet.")
    return addresses


def is_public(address: str) -> bool:
    ip = ipaddress.ip_address(address)
    is_unicast = ip.version == 4 or ip in _UNICAST_6
    return is_unicast and not any(ip in network for network in _NOT_PUBLIC if network.version == ip.version)
