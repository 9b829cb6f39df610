"""Whether decoders feed the engine on this machine: jobs go from files to answers as in a worker, without a queue."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

import av
import numpy as np
from PIL import Image

from keye.config.host import share_of_cores
from keye.config.job import AnalysisJob, GenerationOptions, ImagePart, VideoPart
from keye.config.outcome import ModelIdentity, WorkerIdentity
from keye.config.settings import Settings
from keye.worker.daemon.bench import Measured, anew, each_in_a_thread, unmeasured
from keye.worker.engine.inbox import Generated, Inbox, PendingGeneration, SamplingOptions
from keye.worker.leases.claims import Claimed
from keye.worker.media.job_media import DecoderPool, MediaCache, MediaLimits
from keye.worker.media.media_roots import MediaRoots
from keye.worker.results.event_writer import EventWriter
from keye.worker.tasks.attempt import Attempt
from keye.worker.tasks.lookahead import Lookahead, most_unprepared, most_waiting
from keye.worker.tasks.starvation import Starvation
from keye.worker.tasks.workbench import Workbench

if TYPE_CHECKING:
    import torch

    from keye.worker.engine.step_loop import Engine
    from keye.worker.model.processor import KeyeProcessor, PreparedPrompt

PHOTO_SIZE = (4000, 3000)
CLIP_SIZE = (1280, 720)
CLIP_SECONDS = 4
CLIP_RATE = 30

# Nobody settles it.
_LEASE = Claimed("bench", "", 1, 1, claimed_at=0.0, submitted_at=None, deadline_at=None, idempotency_key=None)


def measure_feeding(
    engine: "Engine",
    processor: "KeyeProcessor",
    device: "torch.device",
    settings: Settings,
    num_running: int,
    new_tokens: int,
    measuring: Callable[[str], object] = lambda _: None,
) -> Iterator[str]:
    """Lines of Markdown: a table with a row for photos and one for clips, and how to read it.

    Twice as many jobs as `num_running` sequences, of `new_tokens` each, are run three times: prepared only, generated
    only, and both.
    """
    photo, clip = ("x".join(map(str, size)) for size in (PHOTO_SIZE, CLIP_SIZE))
    names = f"photos, {photo}", f"clips, {clip}, {CLIP_SECONDS} s"
    num_cores = share_of_cores(settings.host_workers)
    yield "| jobs/s | decoders feed | engine takes | both together | engine waited | decoders that would do |"
    yield "|---|---|---|---|---|---|"
    with TemporaryDirectory() as name, _workbench(engine, processor, settings, Path(name)) as bench:
        for kind, write in zip(names, KINDS, strict=True):
            measuring(f"whether decoders feed the engine: {kind}")
            try:
                options = GenerationOptions(max_new_tokens=new_tokens, temperature=0)
                job = AnalysisJob(media=(write(Path(name)),), prompt="What is to be seen?", generation=options)
                feeds, takes, together, waited = _measure(bench, engine, [job] * 2 * num_running, num_running)
            except Exception as error:
                yield unmeasured(kind, error, num_cells=5)
            else:
                would_do = math.ceil(min(settings.decoders, num_cores) * takes / feeds)
                yield Measured(
                    f"| {kind} | {feeds:.2f} | {takes:.2f} | {together:.2f} | {waited} | {would_do} |",
                    measured=kind,
                    decoders_feed=round(feeds, 2),
                    engine_takes=round(takes, 2),
                    both_together=round(together, 2),
                    engine_waited=waited,
                    decoders_that_would_do=would_do,
                )
    yield (
        f"\n{settings.decoders} decoders (KEYE_DECODERS) on {num_cores} cores, {new_tokens} new tokens an answer. The "
        "engine waited while it had room for another job and those that were left were decoded, or waited for memory "
        "for their pixels (KEYE_MAX_DECODED_BYTES). It goes on to wait where decoders feed less than it takes: about "
        "so many would do, with a core each."
    )
    if device.type == "cpu":
        yield "Here engine and decoders share the cores. A GPU takes more, and leaves them to the decoders."


@contextmanager
def _workbench(engine: "Engine", processor: "KeyeProcessor", settings: Settings, folder: Path) -> Iterator[Workbench]:
    """As a worker's, with media below `folder` and without Redis."""
    # It keeps nothing that it has decoded, so all jobs may ask about one file.
    with DecoderPool.of(settings.model_copy(update={"frames_cache_bytes": 0})) as decoders:
        yield Workbench(
            inbox=engine.inbox,
            # Nor does the engine of what it has computed.
            processor=replace(processor, shares_prefixes=False),
            sampling={},
            media_limits=replace(MediaLimits.of(settings), media_roots=MediaRoots([folder])),
            media_cache=MediaCache(folder / "cache", 0),
            decoders=decoders,
            lookahead=Lookahead(settings.decoders),
            events=_Unheard(),
            model=ModelIdentity(name="", model_type="", precision=""),
            worker=WorkerIdentity(host="", pid=0, device=""),
        )


class _Feeding(NamedTuple):
    """Jobs a second that are prepared, that the engine takes, and that come of both; how long it waited, in words."""

    feeds: float
    takes: float
    together: float
    waited: str


class _Unheard(EventWriter):
    """Of jobs that nobody has sent."""

    def __init__(self) -> None:
        """There is no Redis."""

    def write(self, lease: Claimed, events: list[str]) -> bool:
        return True

    def write_waits(self, lease: Claimed, waits: bool) -> None:
        pass


class _Instant(Inbox):
    """Of an engine that takes no time; `prompt` is what it was given last."""

    prompt: "PreparedPrompt"

    def submit(self, prompt: "PreparedPrompt", sampling: SamplingOptions, **_: Any) -> PendingGeneration:
        self.prompt = prompt
        pending = PendingGeneration(prompt, sampling)
        pending.end(Generated("", (), "length", len(prompt.input_ids), 0, None, 0))
        return pending


def _measure(bench: Workbench, engine: "Engine", jobs: Sequence[AnalysisJob], num_running: int) -> _Feeding:
    instant = _Instant(engine.inbox.max_tokens)
    num_decoders = bench.decoders.num_decoders
    num_ahead = most_unprepared(num_decoders) + most_waiting(num_decoders)

    def attempt(bench: Workbench, job: AnalysisJob) -> None:
        one = Attempt(bench, job, _LEASE)
        with bench.lookahead.watching(one):
            one.run()

    def generate(job: AnalysisJob) -> None:
        for _ in engine.inbox.submit(anew(instant.prompt), SamplingOptions(job.generation.max_new_tokens)).deltas():
            pass

    prepare = partial(attempt, replace(bench, inbox=instant))
    # First calls load what they need, in each decoder.
    _seconds(prepare, jobs[:num_decoders], num_decoders)
    prepared = _seconds(prepare, jobs, num_ahead)
    generated = _seconds(generate, jobs, num_running)
    starvation = Starvation(engine.snapshot, bench.lookahead.phases)
    starvation.start()
    try:
        both = _seconds(partial(attempt, bench), jobs, num_running + num_ahead)
    finally:
        starvation.stop()
    causes = ", ".join(f"{cause} {seconds:.1f}" for cause, seconds in starvation.seconds.items() if seconds)
    waited = f"{sum(starvation.seconds.values()):.1f} of {both:.1f} s" + (f" ({causes})" if causes else "")
    return _Feeding(len(jobs) / prepared, len(jobs) / generated, len(jobs) / both, waited)


def _seconds(run: Callable[[AnalysisJob], None], jobs: Sequence[AnalysisJob], num_threads: int) -> float:
    """Raises what the first job to fail raised."""
    began = time.perf_counter()
    each_in_a_thread(run, jobs, num_threads)
    return time.perf_counter() - began


def _write_photo(folder: Path) -> ImagePart:
    path = folder / "photo"
    Image.fromarray(_scene(PHOTO_SIZE)).save(path, "JPEG", quality=90)
    return ImagePart(uri=str(path))


def _write_clip(folder: Path) -> VideoPart:
    path = folder / "clip"
    width, height = CLIP_SIZE
    num_frames = CLIP_SECONDS * CLIP_RATE
    scene = _scene((width + 4 * num_frames, height))
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=CLIP_RATE, options={"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(num_frames):
            # The camera moves: what stands still takes a decoder no time.
            seen = np.ascontiguousarray(scene[:, 4 * number : 4 * number + width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(seen, format="rgb24")))
        container.mux(stream.encode(None))
    return VideoPart(uri=str(path))


def _scene(size: tuple[int, int]) -> np.ndarray:
    """Large shapes and the noise of a sensor, which is what most of a photo's bytes are."""
    width, height = size
    draws = np.random.default_rng(0)
    shapes = Image.fromarray(draws.integers(0, 256, (height // 60, width // 60, 3), np.uint8)).resize(size)
    noise = draws.integers(-8, 9, (height, width, 1), np.int16)
    return np.clip(np.asarray(shapes, np.int16) + noise, 0, 255).astype(np.uint8)


# One of each is written for all its jobs.
KINDS: tuple[Callable[[Path], ImagePart | VideoPart], ...] = _write_photo, _write_clip
