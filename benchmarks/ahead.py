"""How full decoders keep an engine: sequences that run at once, against what the decoders alone could feed."""

import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

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
# What a decoder takes for one, about: noise, which costs a JPEG's decoder the most.
SIZE = (3000, 3200)
SEQUENCE_SECONDS = 4
NUM_JOBS = 500
ROUNDS = 3
SIZING = Sizing(factor=1, min_pixels=1, max_pixels=1)


def run() -> str:
    rounds = []
    with tempfile.TemporaryDirectory() as name, EmbeddedValkey() as broker, Client(broker.url) as client:
        picture = Path(name, "picture.jpg")
        noise = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)
        PIL.Image.fromarray(noise).save(picture, quality=95)
        os.environ |= {"KEYE_MEDIA_ROOTS": name, "KEYE_FRAMES_CACHE_BYTES": "0"}
        yard = Yard(broker.url, connect(broker.url), Path(name))
        job = AnalysisJob(prompt=f"wait {SEQUENCE_SECONDS}", media=[ImagePart(uri=str(picture))])
        with yard.worker(ECHO, concurrency=None, KEYE_DECODERS=str(NUM_DECODERS)) as worker:
            for _ in range(ROUNDS):
                alone = _rate_alone(job, Path(name))
                with worker.frozen():
                    job_ids = [answer.id for answer in client.submit_many([job] * NUM_JOBS)]
                rounds.append((SEQUENCE_SECONDS * alone, SEQUENCE_SECONDS * steady_rate(ends_of(yard.redis, job_ids))))
    fed, ran = (mean(each) for each in zip(*rounds, strict=True))
    return (
        "| | sequences |\n|---|---|\n"
        f"| that {NUM_DECODERS} decoders alone can feed | {fed:.1f} |\n"
        f"| that ran, mean | {ran:.1f} |\n"
        f"| ratio, of each round | {', '.join(f'{ours / theirs:.3f}' for theirs, ours in rounds)} |\n"
    )


def _rate_alone(job: AnalysisJob, root: Path) -> float:
    """Jobs a second of decoders that never wait."""
    limits, cache = MediaLimits.of(Settings(media_roots=(root,))), MediaCache(root / "cache", max_bytes=0)
    parts = job.all_media()
    with DecoderPool(NUM_DECODERS, 60, 2**30) as pool, ThreadPoolExecutor(2 * NUM_DECODERS) as threads:

        def decode_one(_: int) -> None:
            decode(parts, fetch(parts, limits, cache), limits, SIZING, pool)

        list(threads.map(decode_one, range(2 * NUM_DECODERS)))
        began = time.perf_counter()
        list(threads.map(decode_one, range(100)))
        return 100 / (time.perf_counter() - began)
