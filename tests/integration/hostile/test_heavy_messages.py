"""Messages that cost more than they weigh, or weigh more than any: refused before they cost anything, and told of."""

import bz2
import gzip
import json
import lzma
import zlib
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import pytest

from keye.config.codes import ErrorCode
from keye.producer import InvalidJob
from keye.worker.broker.envelope import MAX_MESSAGE_BYTES
from tests.integration.hostile.echo_host import EchoHost
from tests.integration.hostile.messages import ABSENT, as_body, message, sealed_job

MAX_GROWTH_BYTES = 100 * 10**6
# Of a message as large as any may be, which is read, taken apart and put together.
MAX_GROWTH_OF_LARGEST_BYTES = 400 * 10**6
# What a prompt holds that would have to be kept apart from control tokens.
NO_CHARACTER = "\ufdd0"

# What bz2 makes of 45,899,235 zeros, for which it takes many seconds. Several such streams are one.
BLOCK = (
    b"BZh91AY&SY\x0e\t\xe2\xdf\x01_\x8e@\x00\xc0\x00\x00\x08 \x000\x80MFB\xa0%\xa9\n\x80\x97\x17rE8P\x90\x0e\t\xe2\xdf"
)
PRESSED: dict[str, tuple[str, Callable[[], bytes]]] = {
    "bz2, 1.4 kB for 1.4 GB": ("application/x-bz2", lambda: BLOCK * 31),
    "zlib": ("application/x-gzip", lambda: zlib.compress(bytes(3 * 10**8), 1)),
    "gzip": ("application/x-gzip", lambda: gzip.compress(bytes(3 * 10**8), 1)),
    "lzma": ("application/x-lzma", lambda: lzma.compress(bytes(10**8), preset=0)),
    "gzip by another name": ("gzip", lambda: gzip.compress(b"[[], {}, {}]")),
    "in a way to come": ("application/zstd", lambda: b"(\xb5/\xfd"),
}


@pytest.mark.holds(
    "docs/reliability.md#promises",
    "Compressed bodies are not expanded,",
)
@pytest.mark.holds("docs/design.md#decisions", "a compressed body is expanded whatever it holds")
@pytest.mark.parametrize("kind", PRESSED)
def test_a_compressed_body_is_never_expanded(host: EchoHost, kind: str) -> None:
    compression, press = PRESSED[kind]
    job_id = str(uuid4())
    raw = message(job_id, {"headers.compression": compression, "body": as_body(press())})
    before = host.peak_bytes()
    host.send(raw)
    failure = host.failure(job_id)
    assert failure.code is ErrorCode.INVALID_JOB
    assert "compressed" in failure.message
    assert "compressed" in host.quarantined(raw).reason
    host.answer_another()
    assert host.peak_bytes() - before < MAX_GROWTH_BYTES


def test_the_smallest_bomb_is_one() -> None:
    assert len(BLOCK * 31) < 1450
    assert len(bz2.decompress(BLOCK * 2)) == 2 * 45_899_235


FILLERS = {
    "lists": b"[],",
    "objects": b"{},",
    "numbers": b"0,",
    "texts": b'"",',
    "lists of lists": b"[[[[]]]],",
    "objects of objects": b'{"":{"":{}}},',
}


@pytest.mark.holds(
    "docs/reliability.md#promises",
    "Compressed bodies are not expanded,",
)
@pytest.mark.parametrize("kind", FILLERS)
@pytest.mark.parametrize("place", ["envelope", "body"])
def test_many_small_objects_are_not_made(host: EchoHost, kind: str, place: str) -> None:
    """Twenty megabytes of them would take gigabytes."""
    size = 20 * 10**6 if place == "envelope" else 17 * 10**6
    filler = FILLERS[kind]
    text = b'[[], {"sealed": [' + filler * (size // len(filler)) + b"0]}, {}]"
    job_id = str(uuid4())
    raw = (
        message(job_id, {"headers.filler": "HERE"}) if place == "envelope" else message(job_id, {"body": as_body(text)})
    )
    raw = raw.replace(b'"HERE"', text)
    before = host.peak_bytes()
    host.send(raw)
    kept = host.quarantined(raw)
    assert "commas and brackets" in kept.reason
    host.answer_another()
    assert host.peak_bytes() - before < MAX_GROWTH_OF_LARGEST_BYTES
    assert place == "envelope" or host.failure(job_id).code is ErrorCode.INVALID_JOB


FAULTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "unknown fields": lambda number: {f"k{i}": 1 for i in range(number)},
    "media of a kind": lambda number: {"media": [1] * number},
    "stops of a kind": lambda number: {"generation": {"stop": [1] * number}},
    "messages of a kind": lambda number: {"prompt": ABSENT, "messages": [1] * number},
    "parts of a kind": lambda number: {"prompt": ABSENT, "messages": [{"role": "user", "content": [1] * number}]},
}


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("number", [90_000, 700_000])
def test_a_job_of_nothing_but_faults_is_refused_in_brief(host: EchoHost, kind: str, number: int) -> None:
    job_id = str(uuid4())
    before = host.peak_bytes()
    host.send(message(job_id, sealed=sealed_job(job_id, **FAULTS[kind](number))))
    failure = host.failure(job_id)
    assert failure.code is ErrorCode.INVALID_JOB
    assert len(failure.message) <= 10_000
    host.answer_another()
    assert host.peak_bytes() - before < MAX_GROWTH_OF_LARGEST_BYTES


@pytest.mark.parametrize("num_bytes", [MAX_MESSAGE_BYTES + 1, 3 * MAX_MESSAGE_BYTES])
def test_a_message_above_the_limit_is_kept_in_part_and_not_read(host: EchoHost, num_bytes: int) -> None:
    frame = message(str(uuid4()), {"headers.filler": ""})
    raw = message(str(uuid4()), {"headers.filler": "a" * (num_bytes - len(frame))})
    assert len(raw) == num_bytes
    host.send(raw)
    assert f"it has {num_bytes} bytes, the limit is {MAX_MESSAGE_BYTES}" in host.quarantined(raw).reason
    host.answer_another()


@pytest.mark.parametrize(
    "changes",
    [
        {"headers.shadow": "a" * 10**6},
        {"headers.stamps": {"a" * 10**6: "a" * 10**6}},
        {"properties.delivery_tag": "a" * 10**6},
        {"properties.delivery_info": {"exchange": "a" * 10**6, "routing_key": "a" * 10**6}},
        {"headers.id": "a" * 10**6},
        {"headers.eta": "2" * 10**6},
        {"properties.priority": "3" * 10**6},
        {"headers.group": "a" * 10**6, "headers.root_id": "b" * 10**6},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_megabyte_in_any_field_costs_nobody_anything(host: EchoHost, changes: dict[str, Any]) -> None:
    host.send(message(str(uuid4()), changes))
    host.answer_another()


def prompt_of_12_megabytes() -> str:
    return NO_CHARACTER * 4_000_000


def test_a_prompt_of_12_megabytes_is_refused(host: EchoHost) -> None:
    with pytest.raises(InvalidJob, match="12000000 bytes of text, the limit is"):
        host.client.submit(prompt=prompt_of_12_megabytes())
    job_id = str(uuid4())
    body = json.dumps([[], {"sealed": sealed_job(job_id, prompt=prompt_of_12_megabytes())}, {}], ensure_ascii=False)
    host.send(message(job_id, {"body": as_body(body.encode())}))
    failure = host.failure(job_id)
    assert failure.code is ErrorCode.INVALID_JOB
    assert "12000000 bytes of text, the limit is" in failure.message
    host.answer_another()
