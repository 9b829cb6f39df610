"""Real encoded files, made when a test needs them. Every frame of a clip has its number drawn in, to be read back."""

import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt

Frame = npt.NDArray[np.uint8]

# The AV1 encoder reads this once and otherwise writes its settings to the tests' output.
os.environ.setdefault("SVT_LOG", "0")

QUARTERS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0)}

NUM_BITS = 10
_COLUMNS = 5
CLIP_SIZE = (96, 160)

_QUIET_AND_QUICK = {
    "libx264": {"preset": "veryfast", "x264-params": "open-gop=1"},
    "libx265": {"preset": "ultrafast", "x265-params": "log-level=none:open-gop=1:bframes=3"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"},
    "libsvtav1": {"preset": "8", "crf": "20"},
    "mpeg4": {},
}


def draw_frame(number: int, size: tuple[int, int] = CLIP_SIZE) -> Frame:
    """Two rows of bright and dark cells, which spell `number` in binary, the lowest bit first."""
    bits = np.array([number >> bit & 1 for bit in range(NUM_BITS)], np.uint8).reshape(-1, _COLUMNS)
    rows = np.arange(size[0]) * len(bits) // size[0]
    columns = np.arange(size[1]) * _COLUMNS // size[1]
    cells = 40 + 175 * bits[rows][:, columns]
    return np.repeat(cells[:, :, None], 3, axis=2).astype(np.uint8)


def read_number(frame: Frame) -> int:
    """The number drawn in a frame, whatever size it was decoded to."""
    height, width = frame.shape[:2]
    row_centres = [height // 4, 3 * height // 4]
    column_centres = [int((column + 0.5) * width / _COLUMNS) for column in range(_COLUMNS)]
    bits = frame[np.ix_(row_centres, column_centres)].mean(axis=-1).ravel() > 128
    return int(sum(1 << bit for bit, is_bright in enumerate(bits) if is_bright))


def encode_clip(
    path: Path,
    seconds: Sequence[float],
    codec: str = "libx264",
    *,
    size: tuple[int, int] = CLIP_SIZE,
    keyframe_every: int = 24,
    rotation: int = 0,
    pixel_format: str = "yuv420p",
    container_options: dict[str, str] | None = None,
) -> Path:
    """Write a clip that shows frame n at `seconds[n]`, turned by `rotation` degrees counterclockwise."""
    with av.open(path, "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=30, options=_QUIET_AND_QUICK[codec])
        stream.height, stream.width = size
        stream.pix_fmt = pixel_format
        stream.codec_context.gop_size = keyframe_every
        stream.codec_context.time_base = stream.time_base = Fraction(1, 1000 if codec == "mpeg4" else 90000)
        if rotation:
            stream.set_display_rotation(rotation)
        for number, time in enumerate(seconds):
            frame = av.VideoFrame.from_ndarray(draw_frame(number, size))
            frame.time_base = stream.codec_context.time_base
            frame.pts = round(time / frame.time_base)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def cut_without_encoding(source: Path, path: Path, start_seconds: float) -> Path:
    """Copy a clip from the keyframe before `start_seconds`, and hide what comes before it by an edit list."""
    with av.open(source) as whole, av.open(path, "w", options={"avoid_negative_ts": "disabled"}) as cut:
        stream = whole.streams.video[0]
        copy = cut.add_stream_from_template(stream)
        start = round(start_seconds / stream.time_base)
        whole.seek(start, stream=stream)
        for packet in whole.demux(stream):
            if packet.dts is not None:
                packet.pts -= start
                packet.dts -= start
                packet.stream = copy
                cut.mux(packet)
    return path


def steady_times(num_frames: int, rate: float = 30) -> list[float]:
    return [number / rate for number in range(num_frames)]


def uneven_times(num_frames: int, seed: int = 7) -> list[float]:
    """Frames that last from 10 ms to 300 ms each, as screen recordings have them."""
    durations = np.random.default_rng(seed).integers(10, 300, num_frames - 1) / 1000
    return [0.0, *np.cumsum(durations).round(3).tolist()]


def times_by_plain_decoding(path: Path) -> list[float]:
    """When each frame is shown, in seconds from the first: the truth that samplers are held against."""
    with av.open(path) as container:
        frames = [(frame.pts, read_number(frame.to_ndarray(format="rgb24"))) for frame in container.decode(video=0)]
        tick = float(container.streams.video[0].time_base)
    assert [number for _, number in frames] == list(range(len(frames))), f"{path} is no good clip to test with"
    return [(pts - frames[0][0]) * tick for pts, _ in frames]


def number_shown_at(time: float, seconds: Sequence[float]) -> int:
    """What a viewer sees: the latest frame that has come by then."""
    return max(number for number, shown_at in enumerate(seconds) if shown_at <= time + 1e-6)


def draw_quarters(height: int = 64, width: int = 96) -> Frame:
    """Red at the top left, green at the top right, blue at the bottom left, yellow at the bottom right."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[: height // 2, : width // 2] = QUARTERS["red"]
    picture[: height // 2, width // 2 :] = QUARTERS["green"]
    picture[height // 2 :, : width // 2] = QUARTERS["blue"]
    picture[height // 2 :, width // 2 :] = QUARTERS["yellow"]
    return picture


def read_quarters(picture: npt.ArrayLike) -> list[str]:
    """The nearest colours' names: top left, top right, bottom left, bottom right."""
    pixels = np.asarray(picture, np.int64)
    height, width = pixels.shape[:2]
    centres = [(row, column) for row in (height // 4, 3 * height // 4) for column in (width // 4, 3 * width // 4)]
    return [min(QUARTERS, key=lambda name: int(abs(pixels[at] - QUARTERS[name]).sum())) for at in centres]
