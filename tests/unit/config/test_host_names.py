"""Which hosts a list of them has."""

import pytest

from keye.config.host_names import is_listed, listed_host, plain_host

LISTED = [
    listed_host(entry)
    for entry in ("Media.example", "*.cdn.example", "93.184.215.14", "[2606:4700::1111]", "*.bücher.example")
]


@pytest.mark.holds(
    "docs/operations.md#which-media-does-a-worker-read",
    "`media.example.com,*.cdn.example.com`: that host, and all below the other",
)
@pytest.mark.parametrize(
    "host",
    [
        *("media.example", "MEDIA.EXAMPLE.", "media。example", "a.cdn.example", "a.b.cdn.example"),
        *("93.184.215.14", "2606:4700:0::1111", "a.bücher.example", "a.xn--bcher-kva.example"),
    ],
)
def test_host_is_found_however_it_is_spelt(host: str) -> None:
    assert is_listed(plain_host(host), LISTED)


@pytest.mark.parametrize(
    "host",
    [
        *("a.media.example", "xmedia.example", "media.example.evil.example", "cdn.example", "xcdn.example"),
        *("93.184.215.15", "093.184.215.14", "1572394766", "2606:4700::1112", "media", "example", "x.93.184.215.14"),
    ],
)
def test_host_beside_those_of_the_list_is_not_found(host: str) -> None:
    assert not is_listed(plain_host(host), LISTED)
