"""Real encoded files, made when a test needs them. Every frame of a clip has its number drawn in, to be read back."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

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

QUIET_AND_QUICK = {
    "libx264": {"preset": "veryfast"},
    "libx265": {"preset": "ultrafast", "x265-params": "log-level=none:open-gop=1:bframes=3"},
    "libvpx": {"deadline": "realtime", "cpu-used": "8"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"},
    "libsvtav1": {"preset": "8", "crf": "20"},
    "mpeg4": {},
    "mpeg2video": {"b": "4M", "bf": "2"},
    "mjpeg": {},
}

# What encodes no other rate or clock than the usual ones.
_TICKS_A_SECOND = {"mpeg4": 1000, "mpeg2video": 30, "mjpeg": 30}


def draw_frame(number: int, size: tuple[int, int] = CLIP_SIZE) -> Frame:
    """Two rows of bright and dark cells, which spell `number` in binary, the lowest bit first."""
    bits = np.array([number >> bit & 1 for bit in range(NUM_BITS)], np.uint8).reshape(-1, _COLUMNS)
    rows = np.arange(size[0]) * len(bits) // size[0]
    columns = np.arange(size[1]) * _COLUMNS // size[1]
    two_lines = np.repeat(40 + 175 * bits[:, columns, None], 3, axis=2)
    return two_lines[rows]


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
    grain: int = 0,
    container_options: Mapping[str, str] | None = None,
    codec_options: Mapping[str, str] | None = None,
) -> Path:
    """Write a clip that shows frame n at `seconds[n]`, turned by `rotation` degrees counterclockwise.

    `grain` is how much brighter each pixel may be by chance, which makes frames large.
    """
    chance = np.random.default_rng(0)
    with keeping_priority(), av.open(path, "w", options=dict(container_options or {})) as container:
        stream = container.add_stream(codec, rate=30, options={**QUIET_AND_QUICK[codec], **(codec_options or {})})
        stream.height, stream.width = size
        stream.pix_fmt = pixel_format
        stream.codec_context.gop_size = keyframe_every
        stream.codec_context.time_base = stream.time_base = Fraction(1, _TICKS_A_SECOND.get(codec, 90000))
        if not seconds:
            container.start_encoding()
        if rotation:
            stream.set_display_rotation(rotation)
        for number, time in enumerate(seconds):
            picture = draw_frame(number, size)
            if grain:
                picture += chance.integers(0, grain, (*size, 1), np.uint8)
            frame = av.VideoFrame.from_ndarray(picture)
            frame.time_base = stream.codec_context.time_base
            frame.pts = round(time / frame.time_base)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@contextmanager
def keeping_priority() -> Iterator[None]:
    """As root, the AV1 encoder makes its caller a real-time thread. All that is started later would be one too: it
    would leave its cores to nobody, and no container's control group would take it."""
    policy, priority = os.sched_getscheduler(0), os.sched_getparam(0)
    yield
    os.sched_setscheduler(0, policy, priority)


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


@dataclass(frozen=True)
class ClipKind:
    """How a clip of the zoo is made. `cut_at` is the frame that an edit list makes the first one."""

    codec: str
    seconds: Sequence[float]
    options: Mapping[str, Any] = field(default_factory=dict)
    cut_at: int = 0


NUM_FRAMES = 240
STEADY = steady_times(NUM_FRAMES)
UNEVEN = uneven_times(NUM_FRAMES)

CLIPS = {
    "h264.mp4": ClipKind("libx264", STEADY),
    "h264_open_gop.mp4": ClipKind("libx264", STEADY, {"codec_options": {"x264-params": "open-gop=1"}}),
    "h264_uneven.mp4": ClipKind("libx264", UNEVEN),
    "h264_turned.mp4": ClipKind("libx264", STEADY, {"rotation": 90}),
    "h264_one_keyframe.mkv": ClipKind("libx264", STEADY, {"keyframe_every": NUM_FRAMES}),
    "h264_fragmented.mp4": ClipKind("libx264", STEADY, {"container_options": {"movflags": "frag_keyframe+empty_moov"}}),
    "h264_cut.mp4": ClipKind("libx264", STEADY, cut_at=40),
    "h264_uneven_cut.mp4": ClipKind("libx264", UNEVEN, cut_at=40),
    "h264_10_bit.mp4": ClipKind("libx264", STEADY, {"pixel_format": "yuv420p10le"}),
    "h264_odd_size.mp4": ClipKind("libx264", STEADY, {"size": (97, 163), "pixel_format": "yuv444p"}),
    "h264_4k.mp4": ClipKind(
        "libx264", steady_times(72), {"size": (2160, 3840), "codec_options": {"preset": "ultrafast"}}
    ),
    "h264_one_frame.mp4": ClipKind("libx264", [0.0]),
    "h264.ts": ClipKind("libx264", STEADY),
    "h264_open_gop.ts": ClipKind("libx264", STEADY, {"codec_options": {"x264-params": "open-gop=1"}}),
    "h264_uneven.ts": ClipKind("libx264", UNEVEN),
    "h264_interlaced.ts": ClipKind("libx264", STEADY, {"codec_options": {"x264-params": "interlaced=1"}}),
    "h264.flv": ClipKind("libx264", STEADY),
    "hevc_open_gop.mp4": ClipKind("libx265", STEADY),
    "hevc_cut.mp4": ClipKind("libx265", STEADY, cut_at=40),
    "hevc_10_bit.mkv": ClipKind("libx265", STEADY, {"pixel_format": "yuv420p10le"}),
    "hevc_open_gop.ts": ClipKind("libx265", STEADY),
    "vp9.webm": ClipKind("libvpx-vp9", STEADY),
    "vp9_uneven.webm": ClipKind("libvpx-vp9", UNEVEN),
    "av1.mp4": ClipKind("libsvtav1", STEADY),
    "av1_10_bit.mp4": ClipKind("libsvtav1", STEADY, {"pixel_format": "yuv420p10le"}),
    "av1_odd_size.mkv": ClipKind("libsvtav1", STEADY, {"size": (97, 163)}),
    "mpeg4.avi": ClipKind("mpeg4", STEADY),
    "mjpeg.avi": ClipKind("mjpeg", STEADY, {"pixel_format": "yuvj420p"}),
    "mpeg2.ts": ClipKind("mpeg2video", STEADY),
    # Where frames are so small that several share a pack, an MPEG-PS tells the times of some of them only.
    "mpeg2.mpg": ClipKind("mpeg2video", STEADY, {"grain": 30, "codec_options": {"qmax": "2"}}),
}


class Zoo:
    """`CLIPS` by name, each made when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[str, Path] = {}

    def __getitem__(self, name: str) -> Path:
        if name not in self._made:
            self._made[name] = make_clip(self._folder, name)
        return self._made[name]


def make_clip(folder: Path, name: str) -> Path:
    """One of `CLIPS`; frame n of what was encoded has the number n drawn in."""
    kind = CLIPS[name]
    path = encode_clip(folder / (f"whole_{name}" if kind.cut_at else name), kind.seconds, kind.codec, **kind.options)
    return cut_without_encoding(path, folder / name, kind.seconds[kind.cut_at]) if kind.cut_at else path


def upright_numbers(frames: npt.NDArray[np.uint8], name: str) -> list[int]:
    """The numbers drawn in the frames [T, H, W, 3] of a clip of the zoo."""
    quarters = CLIPS[name].options.get("rotation", 0) // 90
    return [read_number(np.rot90(frame, -quarters)) for frame in frames]


def shown_by_plain_decoding(path: Path, name: str) -> dict[int, float]:
    """When each frame is shown, in seconds from the first: the truth that samplers are held against."""
    with av.open(path) as container:
        frames = [
            (frame.pts if frame.pts is not None else frame.dts, read_number(_small(frame)))
            for frame in container.decode(video=0)
        ]
        tick = float(container.streams.video[0].time_base)
    expected = range(CLIPS[name].cut_at, len(CLIPS[name].seconds))
    assert [number for _, number in frames] == list(expected), f"{path} is no good clip to test with"
    return {number: (pts - frames[0][0]) * tick for pts, number in frames}


def _small(frame: av.VideoFrame) -> Frame:
    return frame.reformat(CLIP_SIZE[1], CLIP_SIZE[0], "rgb24").to_ndarray()


def number_shown_at(time: float, shown: Mapping[int, float]) -> int:
    """What a viewer sees: the latest frame that has come by then."""
    return max(number for number, shown_at in shown.items() if shown_at <= time + 1e-6)


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
