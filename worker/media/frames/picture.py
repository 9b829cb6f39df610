"""A decoded frame to what a viewer sees of it: upright, of square pixels, on white, in the colours of an SDR screen.

Knows no times and opens nothing.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple, Self, cast

import numpy as np
import numpy.typing as npt
from av.codec.context import CodecContext
from av.sidedata.sidedata import SideDataContainer, Type
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from av.video.stream import VideoStream
from PIL import Image

from keye.worker.media.frames import hdr
from keye.worker.sizing import Size

_Pixels = npt.NDArray[np.uint8]

# As the model's own tools resize; where it shrinks, swscale widens the kernel, so nothing aliases.
_BICUBIC = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP

# The widest that anything sold has is 4:1; what is far beyond is a damaged or a hostile header.
_MAX_PIXEL_ASPECT = 10

# By the number that a stream says (ITU-T H.273). Others than these swscale refuses.
_MATRICES = {
    1: Colorspace.ITU709,
    4: Colorspace.FCC,
    5: Colorspace.ITU601,
    6: Colorspace.ITU601,
    7: Colorspace.SMPTE240M,
    9: Colorspace.BT2020,
    10: Colorspace.BT2020,
}

_UNSPECIFIED = 2  # of all three (ITU-T H.273)

# swscale takes grey for full range whatever it is said to be.
_STRETCHED = np.clip(np.rint((np.arange(256) - 16) * 255 / 219), 0, 255).astype(np.uint8)

# Of these FFmpeg's own decoders pass over the transparency, which lies beside the frames.
_READS_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}


class Orientation(NamedTuple):
    """What is done to a stored frame, in this order. All eight orientations are some of the three."""

    is_transposed: bool = False
    is_upside_down: bool = False
    is_right_to_left: bool = False

    @property
    def is_mirrored(self) -> bool:
        return sum(self) % 2 == 1

    def turn_upright(self, stored: _Pixels) -> _Pixels:
        """A view."""
        turned = stored.swapaxes(0, 1) if self.is_transposed else stored
        return turned[:: -1 if self.is_upside_down else 1, :: -1 if self.is_right_to_left else 1]


class Colours(NamedTuple):
    """What a container says (numbers of ITU-T H.273). Decoders of HEVC and VP9 do not hand it on."""

    colorspace: int
    color_trc: int
    color_primaries: int

    @classmethod
    def of(cls, stream: VideoStream) -> Self:
        """Before a frame has been decoded."""
        codec = stream.codec_context
        return cls(codec.colorspace, codec.color_trc, codec.color_primaries)

    def tell(self, frame: VideoFrame) -> None:
        """It counts where the frame says nothing itself."""
        for name, value in self._asdict().items():
            if getattr(frame, name) == _UNSPECIFIED:
                setattr(frame, name, value)


@dataclass(frozen=True, slots=True)
class Look:
    """How a clip's frames are shown. `square_size` is (height, width) before they are turned upright, of square pixels.

    `is_plain` where any decoder gives the right picture: nothing mirrored, stretched, transparent or HDR in it, and no
    colours to be guessed. `is_padded` where alpha that is zero throughout is no alpha.
    """

    square_size: Size
    orientation: Orientation
    colours: Colours
    is_plain: bool
    is_padded: bool

    @property
    def upright_size(self) -> Size:
        return self.turn(self.square_size)

    def turn(self, size: Size) -> Size:
        """Upright to stored, or stored to upright."""
        return size[::-1] if self.orientation.is_transposed else size


def look_of(stream: VideoStream, colours: Colours, frame: VideoFrame | None) -> Look:
    """By the first frame of `stream`, which has been decoded; without one there is only what the container says."""
    height, width = (frame.height, frame.width) if frame else (stream.height, stream.width)
    matrix_of_others = _MATRICES.get(frame.colorspace, Colorspace.ITU601) if frame else None
    if frame:
        colours.tell(frame)
    # As FFmpeg's players: the container's word before the stream's.
    aspect = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or Fraction(1)
    if not 1 / _MAX_PIXEL_ASPECT <= aspect <= _MAX_PIXEL_ASPECT:
        aspect = Fraction(1)
    orientation = _orientation_of(frame) if frame else Orientation()
    return Look(
        square_size=(height, max(round(width * aspect), min(width, 1))),
        orientation=orientation,
        colours=colours,
        is_plain=frame is not None
        and aspect == 1
        and not orientation.is_mirrored
        and not _has_alpha(frame)
        and not has_alpha_beside(stream)
        and frame.color_trc not in hdr.TRANSFERS
        and _matrix_of(frame) is matrix_of_others
        and not _is_narrow_grey(frame),
        is_padded=stream.codec_context.name == "rawvideo",
    )


def decoder_of(stream: VideoStream) -> VideoCodecContext:
    """The stream's own, unless that would pass over its transparency."""
    if not has_alpha_beside(stream):
        return stream.codec_context
    decoder = CodecContext.create(_READS_ALPHA[stream.codec_context.name], "r")
    assert isinstance(decoder, VideoCodecContext)
    return decoder


def has_alpha_beside(stream: VideoStream) -> bool:
    return stream.metadata.get("alpha_mode") == "1" and stream.codec_context.name in _READS_ALPHA


class Screen:
    """Shows the frames of a clip that looks like `look`, at `size`."""

    def __init__(self, look: Look, size: Size) -> None:
        self._look = look
        self._height, self._width = look.turn(size)
        self._reformatter = VideoReformatter()

    def show(self, frame: VideoFrame) -> _Pixels:
        """Of `size`, [H, W, 3]."""
        self._look.colours.tell(frame)
        if _has_alpha(frame):
            frame = self._on_white(frame)
        if frame.color_trc in hdr.TRANSFERS:
            shown = hdr.to_sdr(self._resize(frame, "rgb48le"), frame.color_trc, frame.color_primaries)
        else:
            shown = self._resize(frame, "rgb24")
        if _is_narrow_grey(frame):
            shown = _STRETCHED[shown]
        return self._look.orientation.turn_upright(shown)

    def _resize(self, frame: VideoFrame, pixel_format: str) -> npt.NDArray[Any]:
        return self._convert(frame, self._height, self._width, pixel_format)

    def _convert(self, frame: VideoFrame, height: int, width: int, pixel_format: str) -> npt.NDArray[Any]:
        matrix = _matrix_of(frame)
        return self._reformatter.reformat(
            frame,
            width,
            height,
            pixel_format,
            src_colorspace=matrix,
            dst_colorspace=matrix,
            interpolation=_BICUBIC,
            threads=1,  # the cores belong to the jobs beside this one
        ).to_ndarray()

    def _on_white(self, frame: VideoFrame) -> VideoFrame:
        """Before it is resized, which would mix what is seen with what is not."""
        drawn = Image.fromarray(self._convert(frame, frame.height, frame.width, "rgba"))
        is_opaque = self._look.is_padded and drawn.getchannel("A").getbbox() is None
        paper = Image.new("RGB", drawn.size, "white")
        paper.paste(drawn, mask=None if is_opaque else drawn)
        opaque = VideoFrame.from_ndarray(np.asarray(paper))
        opaque.color_trc, opaque.color_primaries = frame.color_trc, frame.color_primaries
        return opaque


def _orientation_of(frame: VideoFrame) -> Orientation:
    """By its display matrix: the column of a pixel is a·x + c·y, its row b·x + d·y. Slanted ones go to the nearest."""
    side_data = cast(SideDataContainer, frame.side_data)  # typed in PyAV as one that holds motion vectors only
    if Type.DISPLAYMATRIX not in side_data:
        return Orientation()
    a, b, _, c, d = np.frombuffer(bytes(side_data[Type.DISPLAYMATRIX]), np.int32, 5).tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):
        return Orientation(True, is_upside_down=b < 0, is_right_to_left=c < 0)
    return Orientation(False, is_upside_down=d < 0, is_right_to_left=a < 0)


def _has_alpha(frame: VideoFrame) -> bool:
    return frame.format.has_palette or any(component.is_alpha for component in frame.format.components)


def _is_narrow_grey(frame: VideoFrame) -> bool:
    return frame.format.name.startswith("gray") and frame.color_range == ColorRange.MPEG


def _matrix_of(frame: VideoFrame) -> Colorspace:
    """As the stream says; where it does not, as players guess (mpv's rule): BT.709 for more than 576 rows or from 1280
    columns on, else BT.601."""
    if frame.colorspace in _MATRICES:
        return _MATRICES[frame.colorspace]
    if frame.color_trc in hdr.TRANSFERS:
        return Colorspace.BT2020
    return Colorspace.ITU709 if frame.width >= 1280 or frame.height > 576 else Colorspace.ITU601
