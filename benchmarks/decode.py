"""64 frames of a long clip to the model's size: ours against what one would write with each library."""

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np

from benchmarks.pictures import draw_photo
from benchmarks.side_by_side import compare, measure_alone

NUM_FRAMES = 64
SIZE = (364, 420)  # height, width
CLIP_SECONDS, NUM_JOINS = 30, 20
ROUNDS = 3


def run() -> str:
    with tempfile.TemporaryDirectory() as folder:
        clip = _make_clip(Path(folder))
        lines = [
            f"{NUM_FRAMES} frames of a {CLIP_SECONDS * NUM_JOINS // 60}-minute 1080p H.264 clip to {SIZE[1]}x{SIZE[0]};"
            f" a process each, medians of {ROUNDS} rounds.",
            "",
            *compare("benchmarks.decode", READERS, clip, ROUNDS),
        ]
    return "\n".join(lines) + "\n"


def ours(clip: str) -> Callable[[], object]:
    from keye.config.job import VideoPart
    from keye.worker.media.frames.video import decode_video
    from keye.worker.sizing import VideoFit

    part = VideoPart(uri=clip, max_frames=NUM_FRAMES)

    def read() -> object:
        with open(clip, "rb") as file:
            return decode_video(file, part, lambda _part, num, _h, _w: VideoFit(num, SIZE, SIZE), 10**8)

    return read


def pyav_by_hand(clip: str) -> Callable[[], object]:
    """Seek to each time, decode on to the frame, resize it."""

    def read() -> object:
        frames = []
        with av.open(clip) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for target in np.linspace(0, stream.duration - 1, NUM_FRAMES).astype(int).tolist():
                container.seek(target, stream=stream)
                for frame in container.decode(stream):
                    if frame.pts + frame.duration > target:
                        frames.append(frame.reformat(SIZE[1], SIZE[0], "rgb24").to_ndarray())
                        break
        return np.stack(frames)

    return read


def torchcodec_exact(clip: str) -> Callable[[], object]:
    from torchcodec.decoders import VideoDecoder
    from torchcodec.transforms import Resize

    def read() -> object:
        decoder = VideoDecoder(clip, transforms=[Resize(SIZE)])
        return decoder.get_frames_at(np.linspace(0, len(decoder) - 1, NUM_FRAMES).astype(int).tolist()).data

    return read


def decord_resizing(clip: str) -> Callable[[], object]:
    from decord import VideoReader

    def read() -> object:
        reader = VideoReader(clip, width=SIZE[1], height=SIZE[0])
        return reader.get_batch(np.linspace(0, len(reader) - 1, NUM_FRAMES).astype(int).tolist()).asnumpy()

    return read


def keye_vl_utils_reader(clip: str) -> Callable[[], object]:
    """Its frames keep their size, and are told slow from fast; its processor resizes them later."""
    from keye_vl_utils.vision_process import fetch_video

    return lambda: fetch_video(
        {"video": clip, "max_frames": NUM_FRAMES, "resized_height": SIZE[0], "resized_width": SIZE[1]}
    )


READERS = (ours, pyav_by_hand, torchcodec_exact, decord_resizing, keye_vl_utils_reader)


def _make_clip(folder: Path) -> Path:
    """Half a minute encoded, then joined to itself packet by packet."""
    piece, whole = folder / "piece.mp4", folder / "clip.mp4"
    rate = 30
    with av.open(piece, "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"preset": "veryfast", "crf": "26"})
        stream.height, stream.width, stream.pix_fmt = 1080, 1920, "yuv420p"
        picture = np.tile(draw_photo(1080, 1920), (1, 2, 1))
        grain = np.random.default_rng(1).integers(0, 12, (8, 1080, 1920, 1), dtype=np.uint8)
        for number in range(CLIP_SECONDS * rate):
            moved = picture[:, 2 * number : 2 * number + 1920] + grain[number % len(grain)]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(moved)))
        container.mux(stream.encode(None))
    with av.open(piece) as source, av.open(whole, "w") as joined:
        template = source.streams.video[0]
        copy = joined.add_stream_from_template(template)
        ticks = round(CLIP_SECONDS / template.time_base)
        for join in range(NUM_JOINS):
            source.seek(0)
            for packet in source.demux(template):
                if packet.dts is not None:
                    packet.pts += join * ticks
                    packet.dts += join * ticks
                    packet.stream = copy
                    joined.mux(packet)
    return whole


if __name__ == "__main__":
    os.environ["DECORD_EOF_RETRY_MAX"] = "128"
    measure_alone(READERS, *sys.argv[1:])
