"""Jobs a second through the whole worker, against one process that takes one job at a time and calls `generate`."""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from benchmarks.workload import image_jobs, video_jobs
from keye.config.job import AnalysisJob, ImagePart
from keye.config.outcome import JobResult
from keye.config.settings import Settings
from keye.producer import Client
from keye.worker.demo.embedded_valkey import EmbeddedValkey
from keye.worker.demo.local_worker import SMALL_KEYE, LocalWorker
from keye.worker.media.decode.image import decode_image
from keye.worker.media.frames.video import decode_video
from keye.worker.media.job_media import MediaCache, MediaLimits, fetch
from keye.worker.model.image_processing import Image, Video
from keye.worker.model.load import load_model
from keye.worker.model.processor import KeyeProcessor

T = TypeVar("T")

ROUNDS = 3


def run() -> str:
    with tempfile.TemporaryDirectory() as name, EmbeddedValkey() as broker:
        folder = Path(name)
        mixed = image_jobs(folder, 64) + video_jobs(folder, 8)
        # Clips as cameras make them: here decoding is most of the work. Enough jobs that the first and the last, while
        # which a core waits, do not count.
        videos = 3 * video_jobs(folder, 16, size=(1280, 720), fps=30)
        settings = {"KEYE_MEDIA_ROOTS": name, "KEYE_FRAMES_CACHE_BYTES": "0", "KEYE_PREFIX_CACHE": "false"}
        with LocalWorker(broker.url, folder / "worker.log", settings), Client(broker.url) as client:
            plain = PlainLoop(folder)
            return "\n".join(
                [
                    _compare("64 image and 8 video jobs (clips of 168x168)", client, plain, mixed),
                    _compare("48 video jobs (H.264 720p clips of 2 to 4 s, 30 frames a second)", client, plain, videos),
                ]
            )


def _compare(what: str, client: Client, plain: "PlainLoop", jobs: list[AnalysisJob]) -> str:
    rounds = []
    results: list[JobResult] = []
    for _ in range(ROUNDS):
        ours, results = _timed(lambda: _through_the_worker(client, jobs))
        theirs, answers = _timed(lambda: [plain.answer(job) for job in jobs])
        rounds.append((len(jobs) / ours, len(jobs) / theirs))
        differing = sum(r.raw_text != a for r, a in zip(results, answers, strict=True))
        assert not differing, f"{differing} of {len(jobs)} answers differ between the worker and plain generate"
    return _report(what, rounds, results)


class PlainLoop:
    """What one would write first: open, process, generate, next."""

    def __init__(self, root: Path) -> None:
        self._model = load_model(SMALL_KEYE, dtype=torch.float32)
        self._processor = KeyeProcessor.from_checkpoint(SMALL_KEYE)
        self._limits = MediaLimits.of(Settings(media_roots=(root,)))
        self._media_cache = MediaCache(root / "cache", max_bytes=0)

    def answer(self, job: AnalysisJob) -> str:
        parts = job.all_media()
        fetched = fetch(parts, self._limits, self._media_cache)
        images, videos = [], []
        for part, medium in zip(parts, fetched, strict=True):
            with medium as file:
                if isinstance(part, ImagePart):
                    images.append(Image(decode_image(file, 10**8).pixels))
                else:
                    fit = self._processor.sizing.share([part], self._processor.config.max_position_embeddings).fit_video
                    # One thread: on short clips several are no quicker, and take more of the cores.
                    video = decode_video(file, part, fit, 10**8, num_threads=1)
                    videos.append(Video(video.frames, video.plan.fps))
        content = [*({"type": part.type} for part in parts), {"type": "text", "text": job.prompt}]
        prompt = self._processor.prepare([{"role": "user", "content": content}], images, videos, job.thinking.value)
        batch = self._processor.pad_left([prompt])
        tokens = self._model.generate(**batch, do_sample=False, max_new_tokens=job.generation.max_new_tokens)
        return str(self._processor.tokenizer.decode(tokens[0, len(prompt.input_ids) :], skip_special_tokens=True))


def _through_the_worker(client: Client, jobs: list[AnalysisJob]) -> list[JobResult]:
    submitted = [client.submit(job) for job in jobs]
    return [job.result(timeout=120) for job in submitted]


def _timed(action: Callable[[], T]) -> tuple[float, T]:
    began = time.perf_counter()
    value = action()
    return time.perf_counter() - began, value


def _report(what: str, rounds: list[tuple[float, float]], results: list[JobResult]) -> str:
    ours, theirs = (statistics.median(column) for column in zip(*rounds, strict=True))
    ratio = statistics.median(a / b for a, b in rounds)
    tokens = sum(result.usage.completion_tokens for result in results)
    kinds = sorted({result.media[0].type for result in results})
    lines = [
        f"{what}, {tokens} new tokens, small Keye in float32; medians of {ROUNDS} rounds.",
        "",
        "| | jobs/s | ratio |",
        "|---|---|---|",
        f"| plain: one process, one job at a time, `generate` | {theirs:.1f} | 1 |",
        f"| worker: Redis, Celery, 8 jobs in flight, one engine | {ours:.1f} | {ratio:.2f} |",
        "",
        f"| stage of a job in the worker (median) | {' | '.join(kinds)} |",
        f"|---|{'---|' * len(kinds)}",
    ]
    for stage in ("fetch", "decode", "prepare", "generate", "total"):
        medians = (
            statistics.median(getattr(r.timings, stage) for r in results if r.media[0].type == kind) for kind in kinds
        )
        lines.append(f"| {stage} | {' | '.join(f'{1000 * median:.1f} ms' for median in medians)} |")
    return "\n".join(lines) + "\n"
