"""Clips of scenes, cut hard: each pans, has something moving, flickers, is noisy or stands still. Made from numbers."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
from PIL import Image

from tests.support.zoo import keeping_priority

Picture = npt.NDArray[np.float64]

WAYS = ("pan", "object", "still", "noise", "flicker", "still")


@dataclass(frozen=True)
class CutClip:
    """Times in seconds: where scenes begin but for the first, and from when to when nothing moves."""

    path: Path
    seconds: float
    cuts: tuple[float, ...]
    still: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Coding:
    codec: str
    container: str
    keyframe_every: int
    options: Mapping[str, str] = field(default_factory=dict)


_X265 = "log-level=none"

# As many as encoders that place cuts and as ones that do not know of them, in groups long and short.
CODINGS = (
    Coding("libx264", "mp4", 250, {"preset": "medium"}),
    Coding("libx264", "mp4", 24, {"preset": "veryfast"}),
    Coding("libx264", "mp4", 60, {"preset": "medium", "x264-params": "scenecut=0"}),
    Coding("libx264", "mkv", 250, {"preset": "ultrafast"}),
    Coding("libx264", "mp4", 300, {"preset": "fast", "x264-params": "scenecut=0:bframes=8:b-pyramid=normal"}),
    Coding("libx265", "mp4", 250, {"preset": "ultrafast", "x265-params": _X265}),
    Coding("libx265", "mp4", 60, {"preset": "fast", "x265-params": f"{_X265}:scenecut=0"}),
    Coding("libvpx", "webm", 128, {"deadline": "realtime", "cpu-used": "8"}),
    Coding("libvpx-vp9", "webm", 128, {"deadline": "good", "cpu-used": "5"}),
    Coding("libvpx-vp9", "webm", 9999, {"deadline": "realtime", "cpu-used": "8"}),
    Coding("libsvtav1", "mp4", 160, {"preset": "8", "crf": "35"}),
    Coding("mpeg4", "avi", 12, {"b": "2M", "bf": "0"}),
    Coding("mpeg4", "mp4", 50, {"b": "2M", "bf": "2"}),
    Coding("mpeg2video", "ts", 15, {"b": "3M", "bf": "2"}),
    Coding("mjpeg", "avi", 1),
    Coding("libx264", "ts", 48, {"preset": "medium"}),
    Coding("libx264", "mp4", 250, {"preset": "medium", "tune": "animation"}),
    Coding("libx264", "mp4", 120, {"preset": "medium", "b": "400k"}),
    Coding("libx264", "flv", 100, {"preset": "fast"}),
    Coding("libx264", "mp4", 250, {"preset": "medium", "crf": "30"}),
)


def make_cut_clip(
    folder: Path, number: int, seconds: float = 40, size: tuple[int, int] = (360, 640), rate: int = 30
) -> CutClip:
    """Clip `number`, of the coding of that number; `size` is (height, width)."""
    chance = np.random.default_rng(number)
    coding = CODINGS[number]
    path = folder / f"cuts_{number:02d}_{coding.codec}.{coding.container}"
    begins: list[int] = []
    still: list[tuple[float, float]] = []
    with keeping_priority(), av.open(path, "w") as container:
        stream = container.add_stream(coding.codec, rate=rate, options=dict(coding.options))
        stream.height, stream.width = size
        stream.pix_fmt = "yuvj420p" if coding.codec == "mjpeg" else "yuv420p"
        stream.codec_context.gop_size = coding.keyframe_every
        if bits := coding.options.get("b"):
            stream.codec_context.bit_rate = int(bits.replace("M", "000k").replace("k", "000"))
        done = 0
        while done < rate * seconds:
            way = WAYS[int(chance.integers(len(WAYS)))]
            num_frames = max(int(chance.integers(int(rate * 0.8), rate * 6)), rate * 4 if way == "still" else 0)
            begins.append(done)
            if way == "still":
                still.append((done / rate, (done + num_frames) / rate))
            for picture in _scene(chance, size, num_frames, way):
                frame = av.VideoFrame.from_ndarray(picture.clip(0, 255).astype(np.uint8))
                frame.pts, frame.time_base = done, Fraction(1, rate)
                container.mux(stream.encode(frame))
                done += 1
        container.mux(stream.encode(None))
    return CutClip(path, done / rate, tuple(begin / rate for begin in begins[1:]), tuple(still))


def _scene(chance: np.random.Generator, size: tuple[int, int], num_frames: int, way: str) -> Iterator[Picture]:
    height, width = size
    side = height // 6
    room_x, room_y = width // 4, height // 5
    large = _texture(chance, height + room_y, width + room_x)
    picture = large[:height, :width]
    speed_x, speed_y = chance.integers(1, 5), chance.integers(0, 3)
    for number in range(num_frames):
        match way:
            case "pan":
                x, y = _to_and_fro(number * speed_x, room_x), _to_and_fro(number * speed_y, room_y)
                yield large[y : y + height, x : x + width]
            case "object":
                x = int((width - side) * (0.5 + 0.5 * np.sin(number / 15)))
                y = int((height - side) * (0.5 + 0.5 * np.cos(number / 22)))
                moved = picture.copy()
                moved[y : y + side, x : x + side] = (250, 30, 60)
                yield moved
            case "noise":
                yield picture + chance.normal(0, 6, (height, width, 1))
            case "flicker":
                yield picture * (0.7 + 0.3 * np.sin(number / 7))
            case _:
                yield picture


def _texture(chance: np.random.Generator, height: int, width: int) -> Picture:
    kind = int(chance.integers(6))
    few = chance.uniform(0, 255, (chance.integers(3, 9), chance.integers(3, 12), 3)).astype(np.uint8)
    picture = np.asarray(Image.fromarray(few).resize((width, height), Image.Resampling.BICUBIC)).astype(np.float64)
    if kind % 2:
        picture += chance.normal(0, 12, (height, width, 1))
    if kind % 3 == 0:
        y, x = np.mgrid[:height, :width]
        picture += 40 * np.sin(x / chance.uniform(3, 20) + y / chance.uniform(3, 30))[..., None]
    return picture


def _to_and_fro(moved: int, room: int) -> int:
    return moved % room if moved // room % 2 == 0 else room - moved % room
