"""Seconds of work that are said to wait, against how long they then take: a backlog of several kinds of jobs."""

import random
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.workload import image_jobs, video_jobs
from keye.config.job import AnalysisJob
from keye.producer import Client
from keye.worker.demo.embedded_valkey import EmbeddedValkey
from keye.worker.demo.local_worker import LocalWorker

# Of pictures, small clips, and clips as cameras make them. The last is unlike all that was measured before.
MIXES = ((200, 20, 10), (100, 0, 30), (40, 100, 4), (300, 5, 0))
ROUNDS = 3
HANDED_ON_SECONDS = 2.0


def run() -> str:
    rows = ["| jobs: pictures, small clips, 720p clips | said, s | took, s | ratio |", "|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as name, EmbeddedValkey() as broker:
        folder = Path(name)
        kinds = (image_jobs(folder, 32), video_jobs(folder, 8), video_jobs(folder, 4, size=(1280, 720), fps=30))
        settings = {"KEYE_MEDIA_ROOTS": name, "KEYE_FRAMES_CACHE_BYTES": "0", "KEYE_PREFIX_CACHE": "false"}
        with LocalWorker(broker.url, folder / "worker.log", settings), Client(broker.url) as client:
            _drain(client, _mixed(kinds, (60, 20, 10)))
            for mix in MIXES:
                rounds = [_drain(client, _mixed(kinds, mix)) for _ in range(ROUNDS)]
                said, took = (statistics.median(column) for column in zip(*rounds, strict=True))
                ratios = [said / took for said, took in rounds]
                ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
                rows.append(f"| {', '.join(map(str, mix))} | {said:.1f} | {took:.1f} | {ratio} |")
    return "\n".join(rows)


def _mixed(kinds: tuple[list[AnalysisJob], ...], numbers: tuple[int, ...]) -> list[AnalysisJob]:
    jobs = [jobs[i % len(jobs)] for jobs, number in zip(kinds, numbers, strict=True) for i in range(number)]
    random.Random(0).shuffle(jobs)
    return jobs


def _drain(client: Client, jobs: list[AnalysisJob]) -> tuple[float, float]:
    """What is said once all are queued, and how long it then takes."""
    submitted = [client.submit(job) for job in jobs]
    began_at = time.monotonic()
    said = client.status().drain_seconds or 0.0
    for job in submitted:
        job.result()
    took = time.monotonic() - began_at
    time.sleep(HANDED_ON_SECONDS)
    return said, took
