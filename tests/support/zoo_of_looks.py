"""Clips that only look right where they are turned, laid on white, stretched or brought to other colours."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from av.bitstream import BitStreamFilterContext
from av.stream import Disposition

from keye.config.job import VideoPart
from keye.config.settings import Settings
from keye.worker.media.decoded import DecodedVideo
from keye.worker.media.frames.video import decode_video
from keye.worker.media.job_media import DecoderPool, MediaCache, MediaLimits, decode, fetch
from keye.worker.sizing import Sizing, VideoFit
from tests.support.zoo import CLIP_SIZE, Frame, draw_frame, draw_quarters

# Of red and of blue, the weight in luma (ITU-T H.273).
WEIGHTS = {"BT.601": (0.299, 0.114), "BT.709": (0.2126, 0.0722), "BT.2020": (0.2627, 0.0593), "240M": (0.212, 0.087)}


def write_clip(
    path: Path,
    frames: Iterable[av.VideoFrame],
    codec: str,
    *,
    rotation: tuple[int, bool] = (0, False),
    matrix: Sequence[int] | None = None,
    aspect: Fraction | None = None,
    options: Mapping[str, str] | None = None,
    **tags: int,
) -> Path:
    """Ten frames a second, each as it is; `rotation` is counterclockwise, and mirrored after that."""
    frames = list(frames)
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=10, options=dict(options or {}))
        stream.width, stream.height, stream.pix_fmt = frames[0].width, frames[0].height, frames[0].format.name
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        if rotation != (0, False):
            stream.set_display_rotation(*rotation)
        if matrix is not None:
            stream.set_display_matrix(matrix)
        for number, frame in enumerate(frames):
            frame.pts = number
            for name, value in tags.items():
                setattr(frame, name, value)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def quarters(num_frames: int = 2, pixel_format: str = "yuv420p") -> list[av.VideoFrame]:
    picture = av.VideoFrame.from_ndarray(draw_quarters())
    return [picture.reformat(format=pixel_format, src_colorspace=5, dst_colorspace=5) for _ in range(num_frames)]


def turn(stored: Frame, rotation: tuple[int, bool]) -> Frame:
    """What a viewer sees of a frame stored so."""
    degrees, is_mirrored = rotation
    turned = np.rot90(stored, degrees // 90)
    return turned[:, ::-1] if is_mirrored else turned


def write_with_sei(path: Path, rotation: tuple[int, bool]) -> Path:
    """H.264 in MPEG-TS, its orientation in a message of the stream itself: turned counterclockwise after the flip."""
    degrees, is_mirrored = rotation
    plain = write_clip(path.with_name("plain.ts"), quarters(4), "libx264")
    asked = f"h264_metadata=display_orientation=insert:rotate={degrees}" + (":flip=horizontal" if is_mirrored else "")
    with av.open(plain) as source, av.open(path, "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        said = BitStreamFilterContext(asked, source.streams.video[0], stream)
        for packet in source.demux(source.streams.video[0]):
            for changed in said.filter(packet if packet.size else None):
                changed.stream = stream
                container.mux(changed)
    return path


def transparent_numbers(num_frames: int, pixel_format: str) -> list[av.VideoFrame]:
    """Black throughout; what `draw_frame` has bright is transparent, so a number is seen on white and nowhere else."""
    frames = []
    for number in range(num_frames):
        picture = np.zeros((*CLIP_SIZE, 4), np.uint8)
        picture[..., 3] = np.where(draw_frame(number)[..., 0] > 128, 0, 255)
        frames.append(av.VideoFrame.from_ndarray(picture, "rgba").reformat(format=pixel_format))
    return frames


# Red on the left, green half transparent at the top right, nothing at the bottom right.
SEEN_ON_WHITE = {(0.25, 0.25): (255, 0, 0), (0.25, 0.75): (127, 255, 127), (0.75, 0.75): (255, 255, 255)}


def partly_transparent(pixel_format: str) -> list[av.VideoFrame]:
    picture = np.zeros((*CLIP_SIZE, 4), np.uint8)
    picture[:, :80] = (255, 0, 0, 255)
    picture[:48, 80:] = (0, 255, 0, 128)
    return [av.VideoFrame.from_ndarray(picture, "rgba").reformat(format=pixel_format) for _ in range(2)]


def one_colour(
    signal: Sequence[float], matrix: str, pixel_format: str, size: tuple[int, int], is_full: bool = False
) -> list[av.VideoFrame]:
    """Frames of one colour, its red, green and blue from 0 to 1, computed here from the definition of the matrix."""
    red, green, blue = signal
    of_red, of_blue = WEIGHTS[matrix]
    luma = of_red * red + of_blue * blue + (1 - of_red - of_blue) * green
    differences = [(blue - luma) / (2 - 2 * of_blue), (red - luma) / (2 - 2 * of_red)]
    bits = max(component.bits for component in av.VideoFormat(pixel_format).components)
    scale = 2 ** (bits - 8)
    if is_full:
        codes = [luma * (2**bits - 1), *(d * (2**bits - 1) + 128 * scale for d in differences)]
    else:
        codes = [(16 + 219 * luma) * scale, *((128 + 224 * d) * scale for d in differences)]
    frames = []
    for _ in range(2):
        frame = av.VideoFrame(size[1], size[0], pixel_format)
        for plane, code in zip(frame.planes, codes, strict=False):
            row = np.full(plane.buffer_size, round(code), np.uint16 if bits > 8 else np.uint8)
            plane.update(row.tobytes()[: plane.buffer_size])
        frames.append(frame)
    return frames


def write_tracks(path: Path, tracks: Sequence[tuple[int, Mapping[str, Any]]], length_of_first: int = 4) -> Path:
    """A clip of several video streams, each of (the number drawn in all its frames, what is set on the stream)."""
    with av.open(path, "w") as container:
        streams = []
        for number, settings in tracks:
            stream = container.add_stream("libx264", rate=10)
            stream.height, stream.width, stream.pix_fmt = *CLIP_SIZE, "yuv420p"
            for name, value in settings.items():
                setattr(stream, name, value)
            streams.append((number, stream))
        for shown in range(4):
            for number, stream in streams[shown >= length_of_first :]:
                frame = av.VideoFrame.from_ndarray(draw_frame(number))
                frame.pts = shown
                container.mux(stream.encode(frame))
        for _, stream in streams:
            container.mux(stream.encode(None))
    return path


def colour_at(frame: npt.NDArray[np.uint8], place: tuple[float, float]) -> list[int]:
    height, width = frame.shape[:2]
    return [int(value) for value in frame[int(height * place[0]), int(width * place[1])]]


def look_at(path: Path, max_pixels: int = 10**8, **asked: object) -> DecodedVideo:
    """Of the size that it is."""

    def fit(_part: VideoPart, num_frames: int, height: int, width: int) -> VideoFit:
        return VideoFit(num_frames, (height, width), (height, width))

    with path.open("rb") as file:
        return decode_video(file, VideoPart.model_validate({"uri": str(path), **asked}), fit, max_pixels)


def in_a_child(decoders: DecoderPool, path: Path, **asked: object) -> DecodedVideo:
    limits = MediaLimits.of(Settings(media_roots=(path.parent,)))
    part = VideoPart.model_validate({"uri": str(path), **asked})
    fetched = fetch([part], limits, MediaCache(path.parent / "cache", max_bytes=0))
    (decoded,) = decode([part], fetched, limits, Sizing(factor=2, min_pixels=4, max_pixels=10**6), decoders)
    assert isinstance(decoded, DecodedVideo)
    return decoded


_RED = (0.8, 0.23, 0.1)
_HDR = {"color_trc": 16, "colorspace": 9, "color_primaries": 9}
_LOSSLESS = {"qp": "0", "preset": "ultrafast"}

# Each writes a clip at a path without a suffix. What only PyAV is trusted with, and what any decoder shows right.
ODD: dict[str, Callable[[Path], Path]] = {
    "mirrored": lambda path: write_clip(path.with_suffix(".mp4"), quarters(), "libx264", rotation=(90, True)),
    "transparent": lambda path: write_clip(path.with_suffix(".mov"), partly_transparent("argb"), "qtrle"),
    "transparent beside": lambda path: write_clip(
        path.with_suffix(".webm"), partly_transparent("yuva420p"), "libvpx-vp9", options={"auto-alt-ref": "0"}
    ),
    "second track": lambda path: write_tracks(
        path.with_suffix(".mkv"), [(1, {"disposition": Disposition(0)}), (2, {"disposition": Disposition.default})]
    ),
    "not square": lambda path: write_clip(path.with_suffix(".mp4"), quarters(), "libx264", aspect=Fraction(4, 3)),
    "HD untagged": lambda path: write_clip(
        path.with_suffix(".mp4"), one_colour(_RED, "BT.709", "yuv420p", (720, 1280)), "libx264", options=_LOSSLESS
    ),
    "PQ": lambda path: write_clip(
        path.with_suffix(".mkv"), one_colour(_RED, "BT.2020", "yuv420p10le", CLIP_SIZE), "ffv1", **_HDR
    ),
    "narrow grey": lambda path: write_clip(
        path.with_suffix(".mkv"), one_colour((0.5,) * 3, "BT.709", "gray", CLIP_SIZE), "ffv1", color_range=1
    ),
}
PLAIN: dict[str, Callable[[Path], Path]] = {
    "turned": lambda path: write_clip(path.with_suffix(".mp4"), quarters(), "libx264", rotation=(90, False)),
    "HD tagged": lambda path: write_clip(
        path.with_suffix(".mp4"),
        one_colour(_RED, "BT.709", "yuv420p", (720, 1280)),
        "libx264",
        options=_LOSSLESS,
        colorspace=1,
    ),
    "full range": lambda path: write_clip(
        path.with_suffix(".mp4"),
        one_colour(_RED, "BT.2020", "yuv420p", CLIP_SIZE, is_full=True),
        "libx264",
        options=_LOSSLESS,
        colorspace=9,
        color_range=2,
    ),
}
