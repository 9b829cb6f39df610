"""What an analyzer answers in a second, beside a worker that is asked the same through Valkey."""

import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np

from keye import Analyzer, Client, JobResult
from keye.producer.following import End
from keye.worker.demo.embedded_valkey import EmbeddedValkey
from keye.worker.demo.local_worker import SMALL_KEYE, LocalWorker
from keye.worker.demo.scenes import draw_image_scene

NUM_PICTURES = 300
QUESTION = "What is in the image?"
ROUNDS = 3


def run() -> str:
    with tempfile.TemporaryDirectory() as name, EmbeddedValkey() as broker:
        folder, chance = Path(name), np.random.default_rng(0)
        pictures = [folder / f"{number}.png" for number in range(NUM_PICTURES)]
        for picture in pictures:
            draw_image_scene(chance).image.save(picture)
        here, there = [], []
        for _ in range(ROUNDS):
            with Analyzer(SMALL_KEYE, device="cpu") as analyzer:
                here.append(_measure(partial(analyzer.batch, prompts=QUESTION, temperature=0), pictures))
            worker = LocalWorker(broker.url, folder / "log", {"KEYE_MEDIA_ROOTS": name})
            with worker, Client(broker.url) as client:
                ask = partial(client.map, QUESTION, generation={"temperature": 0})
                there.append(_measure(ask, pictures))
    assert here[0][1] == there[0][1], "the two do not answer alike"
    rates = [[rate for rate, _ in rounds] for rounds in (there, here)]
    base = median(rates[0])
    lines = ["| | jobs/s, of each round | ratio |", "|---|---|---|"]
    for what, of_each in zip(("worker: Valkey, Celery, one engine", "analyzer: the same engine"), rates, strict=True):
        lines.append(f"| {what} | {', '.join(f'{rate:.1f}' for rate in of_each)} | {median(of_each) / base:.2f} |")
    return "\n".join([f"{NUM_PICTURES} drawn pictures, a question each, small Keye in float32.\n", *lines, ""])


def _measure(ask: Callable[[list[str]], Iterable[End]], pictures: list[Path]) -> tuple[float, list[str]]:
    """Jobs a second, and the answers."""
    media = [str(picture) for picture in pictures]
    # First calls load what they need.
    list(ask(media[:20]))
    began = time.perf_counter()
    ends = list(ask(media))
    seconds = time.perf_counter() - began
    return len(media) / seconds, [end.answer for end in ends if isinstance(end, JobResult)]
