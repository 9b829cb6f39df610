"""How full decoders keep an engine: sequences that run at once, against what the decoders alone could feed."""

import importlib
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import numpy as np
import PIL.Image

from benchmarks.queue import ECHO, Yard, ends_of, steady_rate
from keye.config.connection import connect
from keye.config.job import AnalysisJob, ImagePart
from keye.config.settings import Settings
from keye.producer import Client
from keye.worker.demo.embedded_valkey import EmbeddedValkey
from keye.worker.media.job_media import DecoderPool, MediaCache, MediaLimits, decode, fetch
from keye.worker.sizing import Sizing

NUM_DECODERS = 2
# A JPEG of noise, which costs a decoder the most: a tenth of a second where it has a core.
LARGE, SMALL = (3600, 4000), (64, 64)
SEQUENCE_SECONDS = 4
NUM_JOBS = 400
ROUNDS = 3
HELD = "benchmarks.held_decoders"
SIZING = Sizing(factor=1, min_pixels=1, max_pixels=1)


def run() -> str:
    with tempfile.TemporaryDirectory() as name, EmbeddedValkey() as broker:
        os.environ |= {"KEYE_MEDIA_ROOTS": name, "KEYE_FRAMES_CACHE_BYTES": "0", "KEYE_PREFIX_CACHE": "false"}
        lines = ["| 2 decoders of 0.1 s | could feed | ran, mean | ratio, of each round |", "|---|---|---|---|"]
        lines.append(_row("that take all of both cores", broker.url, Path(name), LARGE))
        # Here too, for what they could feed alone.
        importlib.import_module(HELD)
        lines.append(_row("with cores of their own", broker.url, Path(name), SMALL, CELERY_WORKER_INCLUDE=HELD))
    return "\n".join(lines) + "\n"


def _row(kind: str, url: str, folder: Path, size: tuple[int, int], **environ: str) -> str:
    picture = folder / "picture.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    PIL.Image.fromarray(noise).save(picture, quality=95)
    job = AnalysisJob(prompt=f"wait {SEQUENCE_SECONDS}", media=[ImagePart(uri=str(picture))])
    rounds = list(_rounds(url, folder, job, environ))
    fed, ran = (SEQUENCE_SECONDS * median(each) for each in zip(*rounds, strict=True))
    ratios = ", ".join(f"{ours / theirs:.3f}" for theirs, ours in rounds)
    return f"| {kind} | {fed:.1f} | {ran:.1f} | {ratios} |"


def _rounds(url: str, folder: Path, job: AnalysisJob, environ: dict[str, str]) -> Iterator[tuple[float, float]]:
    """Jobs a second: of decoders alone that never wait, and through a worker."""
    yard = Yard(url, connect(url), folder)
    with Client(url) as client, yard.worker(ECHO, None, KEYE_DECODERS=str(NUM_DECODERS), **environ) as worker:
        for _ in range(ROUNDS):
            alone = _rate_alone(job, folder)
            with worker.frozen():
                job_ids = [answer.id for answer in client.submit_many([job] * NUM_JOBS)]
            yield alone, steady_rate(ends_of(yard.redis, job_ids))


def _rate_alone(job: AnalysisJob, root: Path) -> float:
    limits, cache = MediaLimits.of(Settings(media_roots=(root,))), MediaCache(root / "cache", max_bytes=0)
    parts = job.all_media()
    with DecoderPool(NUM_DECODERS, 60, 2**30) as pool, ThreadPoolExecutor(2 * NUM_DECODERS) as threads:

        def decode_one(_: int) -> None:
            decode(parts, fetch(parts, limits, cache), limits, SIZING, pool)

        list(threads.map(decode_one, range(2 * NUM_DECODERS)))
        began = time.perf_counter()
        list(threads.map(decode_one, range(100)))
        return 100 / (time.perf_counter() - began)
