"""Small files that are made to hurt end with a code, or as pixels, in little time and memory; no neighbour minds."""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from keye.config.faults import Fault
from keye.config.job import ImagePart, VideoPart
from keye.config.settings import Settings
from keye.worker.media.decode.decoder import DecodingOrder
from keye.worker.media.decode.pool import DecoderPool
from keye.worker.media.decoded import Decoded, DecodedImage
from keye.worker.media.limits import MediaLimits
from keye.worker.sizing import Sizing
from tests.support.decoder_children import children_of
from tests.support.image_bombs import IMAGE_BOMBS
from tests.support.video_bombs import VIDEO_BOMBS
from tests.support.zoo import draw_quarters, read_quarters

MAX_PIXELS = 100_000_000
CPU_SECONDS = 2
# A silence at most, or the CPU time; twice where a decoder dies of it; and what a machine under load takes besides.
SILENCE_SECONDS = 6.0
MAX_SECONDS = 30.0
MAX_RESIDENT_BYTES = 800 * 2**20
BOMBS: dict[str, Callable[[Path], bytes]] = VIDEO_BOMBS | {
    name: lambda _folder, make=make: make() for name, make in IMAGE_BOMBS.items()
}


@pytest.fixture(scope="module")
def pool() -> Iterator[DecoderPool]:
    with DecoderPool(2, SILENCE_SECONDS, max_decoded_bytes=2**30) as pool:
        yield pool


def decode(pool: DecoderPool, path: Path, part: ImagePart | VideoPart) -> Decoded:
    limits = Settings(
        max_image_pixels=MAX_PIXELS, max_decoded_bytes=2**30, video_decoder="pyav", max_image_cpu_seconds=CPU_SECONDS
    )
    with path.open("rb") as file, pool.share() as share:
        order = DecodingOrder(
            part=part,
            file=file,
            limits=MediaLimits.of(limits),
            sizing=Sizing(factor=4, min_pixels=16, max_pixels=96 * 64),
            on_frame=lambda done, total: None,
            check=lambda: None,
        )
        return pool.decode(order, share)


def peak_bytes(child: int) -> int:
    """The most that it has ever held."""
    status = Path(f"/proc/{child}/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


@pytest.mark.parametrize("name", BOMBS)
def test_bomb_ends_with_a_code_and_harms_no_neighbour(pool: DecoderPool, tmp_path: Path, name: str) -> None:
    good, bomb = tmp_path / "good.png", tmp_path / name
    Image.fromarray(draw_quarters()).save(good)
    bomb.write_bytes(BOMBS[name](tmp_path))
    assert bomb.stat().st_size <= 2**20

    def decode_bomb() -> Decoded | Fault:
        try:
            return decode(pool, bomb, ImagePart(uri="file:") if name in IMAGE_BOMBS else VideoPart(uri="file:"))
        except Fault as fault:
            return fault

    def decode_good() -> Decoded:
        return decode(pool, good, ImagePart(uri="file:"))

    began_at = time.monotonic()
    with ThreadPoolExecutor(2) as jobs:
        ends, beside = jobs.submit(decode_bomb), jobs.submit(decode_good)
        outcome, neighbour = ends.result(), beside.result()
    assert time.monotonic() - began_at < MAX_SECONDS
    if isinstance(outcome, Fault):
        assert outcome.code.startswith("MEDIA_")
    for picture in (neighbour, decode_good()):
        assert isinstance(picture, DecodedImage)
        assert read_quarters(picture.pixels) == ["red", "green", "blue", "yellow"]
    assert all(peak_bytes(child) < MAX_RESIDENT_BYTES for child in children_of(os.getpid()))
