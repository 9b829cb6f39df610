"""What it costs to hand decoded frames from a decoder child to the worker: shared memory against a pickle in a pipe."""

import statistics
import tempfile
import time
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import av
import numpy as np

from keye.config.job import VideoPart
from keye.config.settings import Settings
from keye.worker.media.decode.decoder import DecodingOrder
from keye.worker.media.decode.pool import DecoderPool
from keye.worker.media.decoded import DecodedVideo
from keye.worker.media.limits import MediaLimits
from keye.worker.sizing import Sizing

NUM_FRAMES, HEIGHT, WIDTH = 64, 364, 420
ROUNDS = 15


def run() -> str:
    with tempfile.TemporaryDirectory() as folder, DecoderPool(1, 60, 2**30) as pool:
        clip = _encode_clip(Path(folder) / "clip.mp4")
        rounds = [_hand_over(pool, clip) for _ in range(ROUNDS)][1:]
    handing, reading = (1000 * statistics.median(column) for column in zip(*rounds, strict=True))
    pickled = 1000 * statistics.median(_pickle_times()[1:])
    megabytes = NUM_FRAMES * HEIGHT * WIDTH * 3 / 1e6
    lines = [
        f"{NUM_FRAMES} frames of {WIDTH}x{HEIGHT} ({megabytes:.0f} MB) from child to worker; medians of {ROUNDS - 1}.",
        "",
        "| | ms |",
        "|---|---|",
        f"| shared memory: last frame decoded, to an array in the worker | {handing:.1f} |",
        f"| the worker's first reading of all its bytes | {reading:.1f} |",
        f"| pickle through a pipe, to an array in the worker | {pickled:.1f} |",
    ]
    return "\n".join(lines) + "\n"


def _hand_over(pool: DecoderPool, clip: Path) -> tuple[float, float]:
    """Seconds from the child's last frame to the array here, and from there to its every byte read once."""
    decoded_at = 0.0

    def note(done: int, total: int) -> None:
        nonlocal decoded_at
        decoded_at = time.perf_counter()

    with clip.open("rb") as file, pool.share() as share:
        order = DecodingOrder(
            part=VideoPart(uri="file:", fps=30),
            file=file,
            limits=MediaLimits.of(Settings(max_image_pixels=10**8, max_decoded_bytes=2**30)),
            sizing=Sizing(factor=28, min_pixels=1, max_pixels=HEIGHT * WIDTH),
            on_frame=note,
            check=lambda: None,
        )
        video = pool.decode(order, share)
    handed_at = time.perf_counter()
    assert isinstance(video, DecodedVideo)
    assert video.frames.shape == (NUM_FRAMES, HEIGHT, WIDTH, 3)
    video.frames.max()
    return handed_at - decoded_at, time.perf_counter() - handed_at


def _pickle_times() -> list[float]:
    context = get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_send_pickles, args=(theirs,))
    child.start()
    theirs.close()
    seconds = []
    for _ in range(ROUNDS):
        sent_at, _frames = ours.recv()
        # Both processes read the machine's one monotonic clock.
        seconds.append(time.perf_counter() - sent_at)
    child.join()
    return seconds


def _send_pickles(pipe: Connection) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (NUM_FRAMES, HEIGHT, WIDTH, 3), np.uint8)
    for _ in range(ROUNDS):
        pipe.send((time.perf_counter(), frames))
        time.sleep(0.05)


def _encode_clip(path: Path) -> Path:
    chance = np.random.default_rng(0)
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for _ in range(NUM_FRAMES):
            noise = chance.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noise)))
        container.mux(stream.encode(None))
    return path
