"""Photos to the model's size, through the worker's front door and a decoder child: against a loop around Pillow."""

import sys
import tempfile
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path

from PIL import Image

from benchmarks.pictures import draw_photo
from benchmarks.side_by_side import compare, measure_alone
from keye.config.job import ImagePart
from keye.config.settings import Settings
from keye.worker.media.job_media import DecoderPool, MediaCache, MediaLimits, decode, fetch
from keye.worker.sizing import Size, Sizing, fit_size

NUM_READS, NUM_PHOTOS, PHOTO_SIZE, MODEL_PIXELS = 1000, 10, (3000, 4000), 1280 * 28 * 28
ROUNDS = 2


def run() -> str:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in range(NUM_PHOTOS):
            Image.fromarray(draw_photo(*PHOTO_SIZE, seed=number)).save(folder / f"{number}.jpg", quality=90)
        lines = [
            f"{NUM_READS} reads of {NUM_PHOTOS} JPEG photos of 12 megapixels to {MODEL_PIXELS / 1e6:.1f}; a process "
            f"each and its child, medians of {ROUNDS} rounds.",
            "",
            *compare("benchmarks.photos", READERS, folder, ROUNDS),
        ]
    return "\n".join(lines) + "\n"


def ours(folder: str) -> Callable[[], object]:
    """Fetched, decoded in a child, and handed over in shared memory, as a job's photos are."""

    def read() -> object:
        limits = MediaLimits.of(Settings(media_roots=(Path(folder),)))
        cache = MediaCache(Path(folder) / "cache", max_bytes=0)
        sizing = Sizing(factor=28, min_pixels=28 * 28, max_pixels=MODEL_PIXELS)
        with DecoderPool(1, 60, 2**30) as decoders:
            for photo in _photos(folder):
                parts = [ImagePart(uri=str(photo))]
                decode(parts, fetch(parts, limits, cache), limits, sizing, decoders)
        return None

    return read


def pillow_draft(folder: str) -> Callable[[], object]:
    """Pillow's draft mode, then a resize."""

    def read() -> object:
        for photo in _photos(folder):
            with Image.open(photo) as image:
                height, width = _model_size(*image.size[::-1])
                image.draft("RGB", (width, height))
                image.resize((width, height), Image.Resampling.BICUBIC)
        return None

    return read


READERS = (ours, pillow_draft)


def _model_size(height: int, width: int) -> Size:
    return fit_size(height, width, factor=28, min_pixels=28 * 28, max_pixels=MODEL_PIXELS)


def _photos(folder: str) -> "islice[Path]":
    return islice(cycle(sorted(Path(folder).glob("*.jpg"))), NUM_READS)


if __name__ == "__main__":
    measure_alone(READERS, *sys.argv[1:])
