"""A job that waits for memory for its pixels, while the engine has room for it; for others see tests/acceptance."""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from threading import Thread
from typing import Any

import pytest
from PIL import Image

from keye.config.faults import Fault
from keye.config.job import GenerationOptions, ImagePart
from keye.config.outcome import JobResult
from keye.worker.leases.claims import Claimed
from keye.worker.media.job_media import DecoderPool, decode, fetch
from keye.worker.tasks.attempt import Attempt
from keye.worker.tasks.lookahead import Lookahead
from keye.worker.tasks.starvation import Starvation
from keye.worker.tasks.workbench import Workbench
from tests.integration.analyze.plant import Plant, a_job
from tests.support.conditions import eventually

# Room for the pixels of one such picture.
MAX_BYTES = 100_000


def test_the_engine_waits_for_memory_that_others_hold(plant: Plant) -> None:
    path = str(plant.media / "teal.png")
    Image.new("RGB", (500, 500), "teal").save(path)
    part = ImagePart(uri=path)
    with DecoderPool(2, 60, MAX_BYTES) as decoders:
        bench = replace(plant.bench, decoders=decoders, lookahead=Lookahead(2))
        limits = replace(bench.media_limits, max_decoded_bytes=MAX_BYTES)
        held = decode([part], fetch([part], limits, bench.media_cache), limits, bench.processor.sizing, decoders)
        assert held[0].pixels.nbytes > MAX_BYTES / 2

        attempt = Attempt(bench, a_job(media=[part]), Claimed("1", "1", 1, 1, 0, None, None, None))
        starvation = Starvation(plant.engine.snapshot, bench.lookahead.phases)
        starvation.start()
        with bench.lookahead.watching(attempt):
            running = Thread(target=attempt.run)
            running.start()
            eventually(lambda: starvation.seconds["memory"])
            at_first = starvation.seconds.copy()
            eventually(lambda: starvation.seconds["memory"] >= at_first["memory"] + 0.3)
            assert starvation.seconds | {"memory": 0} == at_first | {"memory": 0}
            del held
            running.join()
        starvation.stop()


@pytest.mark.holds(
    "docs/operations.md#what-can-a-broken-or-hostile-file-do", "bounds the pixels of all jobs of a process"
)
@pytest.mark.parametrize(
    "asked", [{}, {"prompt": None, "questions": ["what?", "why?", "where?"]}], ids=["one", "three"]
)
def test_what_a_job_was_shown_counts_until_it_is_answered_and_the_next_waits_for_that(
    plant: Plant, asked: dict[str, Any]
) -> None:
    path = str(plant.media / "olive.png")
    Image.new("RGB", (500, 500), "olive").save(path)
    part = ImagePart(uri=path)

    def attempt(bench: Workbench, **options: Any) -> tuple[Attempt, "Future[JobResult]"]:
        one = Attempt(bench, a_job(media=[part], **options), Claimed("1", "1", 1, 1, 0, None, None, None))
        return one, threads.submit(one.run)

    with DecoderPool(2, 60, MAX_BYTES) as decoders, ThreadPoolExecutor(2) as threads:
        limits = replace(plant.bench.media_limits, max_decoded_bytes=MAX_BYTES)
        bench = replace(plant.bench, inbox=plant.engine.inbox, decoders=decoders, media_limits=limits)
        generation = GenerationOptions(max_new_tokens=400)
        first, answered = attempt(bench, generation=generation, **asked)
        eventually(lambda: first.phase == "running")
        second, other = attempt(bench)
        eventually(lambda: second.phase == "memory" or answered.done())
        assert not answered.done()
        first.interrupt("cancelled")
        assert other.result(60).media
        assert isinstance(answered.exception(60), Fault)
