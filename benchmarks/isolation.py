"""What fresh decoder children for each job cost: photos a second, jobs side by side, as KEYE_DECODER_ISOLATION says."""

import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import get_args

from PIL import Image

from benchmarks.pictures import draw_photo
from keye.config.host import share_of_cores
from keye.config.job import ImagePart
from keye.config.settings import DecoderIsolation, Settings
from keye.worker.media.job_media import DecoderPool, MediaCache, MediaLimits, decode, fetch
from keye.worker.sizing import Sizing

NUM_PHOTOS, PHOTO_SIZE, MODEL_PIXELS = 16, (3000, 4000), 1280 * 28 * 28
PHOTOS_A_JOB = (1, 8)
ROUNDS = 3


def run() -> str:
    num_decoders = share_of_cores(num_workers=1)
    lines = [
        f"Photos of 12 megapixels a second, {NUM_PHOTOS} of them, {num_decoders} decoders and as many jobs at a time; "
        f"medians of {ROUNDS} rounds in turns.",
        "",
        "| photos in a job | `worker` | `job` |",
        "|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as name:
        photo = Path(name) / "photo.jpg"
        Image.fromarray(draw_photo(*PHOTO_SIZE)).save(photo, quality=90)
        for photos_a_job in PHOTOS_A_JOB:
            measure = partial(_photos_a_second, photo, num_decoders, photos_a_job)
            rounds = [[measure(isolation) for isolation in get_args(DecoderIsolation)] for _ in range(ROUNDS)]
            by_worker, by_job = (statistics.median(column) for column in zip(*rounds, strict=True))
            lines.append(f"| {photos_a_job} | {by_worker:.1f} | {by_job:.1f} ({by_job / by_worker:.2f} x) |")
    return "\n".join(lines) + "\n"


def _photos_a_second(photo: Path, num_decoders: int, photos_a_job: int, isolation: DecoderIsolation) -> float:
    limits = MediaLimits.of(Settings(media_roots=(photo.parent,)))
    cache = MediaCache(photo.parent / "cache", max_bytes=0)
    sizing = Sizing(factor=28, min_pixels=28 * 28, max_pixels=MODEL_PIXELS)
    parts = [ImagePart(uri=str(photo))] * photos_a_job

    def run_job(_number: int) -> None:
        decode(parts, fetch(parts, limits, cache), limits, sizing, decoders)

    pool = DecoderPool(num_decoders, 60, 2**30, isolation=isolation)
    with pool as decoders, ThreadPoolExecutor(num_decoders) as jobs:
        list(jobs.map(run_job, range(num_decoders)))  # all are up
        began_at = time.perf_counter()
        list(jobs.map(run_job, range(NUM_PHOTOS // photos_a_job)))
        return NUM_PHOTOS / (time.perf_counter() - began_at)
