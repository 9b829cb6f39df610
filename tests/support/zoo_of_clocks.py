"""Clips whose clock restarts, jumps, wraps, is coarse or missing, and containers that begin oddly; numbers drawn in."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av

from tests.support.zoo import CLIP_SIZE, QUIET_AND_QUICK, draw_frame, keeping_priority

HALF = 60
WHOLE = 2 * HALF
KEYFRAME_EVERY = 24
NTSC = Fraction(30000, 1001)
_HOUR = 3600 * 90000


def encode(
    path: Path,
    numbers: Sequence[int],
    codec: str = "libx264",
    *,
    rate: Fraction | int = 30,
    size: tuple[int, int] = CLIP_SIZE,
    muxer: str | None = None,
    options: dict[str, str] | None = None,
    **of_codec: str,
) -> Path:
    """A clip of a steady rate that shows these numbers; times are made by the encoder, as most programs do."""
    with keeping_priority(), av.open(path, "w", format=muxer, options=options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options={**QUIET_AND_QUICK.get(codec, {}), **of_codec})
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = KEYFRAME_EVERY
        for place, number in enumerate(numbers):
            frame = av.VideoFrame.from_ndarray(draw_frame(number, size))
            frame.pts, frame.time_base = place, 1 / Fraction(rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def halves(suffix: str, codec: str = "libx264", **options: Any) -> Callable[[Path], list[bytes]]:
    """The two parts of a recording, each with a clock that begins anew."""

    def make(folder: Path) -> list[bytes]:
        parts = (range(HALF), range(HALF, WHOLE))
        return [encode(folder / f"half{suffix}", part, codec, **options).read_bytes() for part in parts]

    return make


def set_clock(content: bytes, ticks: Callable[[int], int]) -> bytes:
    """A transport stream, of which the times of picture n in the file are ahead by `ticks(n)`; they have 33 bits."""
    stream = bytearray(content)
    number = 0
    for packet in range(0, len(stream), 188):
        # ISO/IEC 13818-1, 2.4.3: a picture begins in a packet of its own, after what adapts that.
        payload = packet + 4 + (stream[packet + 4] + 1 if stream[packet + 3] & 0x20 else 0)
        if stream[packet + 1] & 0x40 and stream[payload : payload + 4] == b"\0\0\x01\xe0":
            for place in (payload + 9, payload + 14)[: (stream[payload + 7] >> 6) - 1]:
                time = int.from_bytes(stream[place : place + 5])
                ahead = (time >> 33 & 7) << 30 | (time >> 17 & 0x7FFF) << 15 | time >> 1 & 0x7FFF
                ahead += ticks(number)
                bits = (ahead >> 30 & 7) << 33 | (ahead >> 15 & 0x7FFF) << 17 | (ahead & 0x7FFF) << 1
                stream[place : place + 5] = (time & 0xF100010001 | bits).to_bytes(5)
            number += 1
    return bytes(stream)


def boxes(content: bytes) -> list[bytes]:
    """Those of an MP4, on its first level."""
    found = []
    while content:
        size = int.from_bytes(content[:4])
        found.append(content[:size])
        content = content[size:]
    return found


def in_fragments(folder: Path) -> bytes:
    options = {"movflags": "dash+frag_keyframe+empty_moov+default_base_moof"}
    return encode(folder / "fragments.mp4", range(WHOLE), options=options).read_bytes()


def _joined(suffix: str, codec: str = "libx264", cut: int = 0, **options: Any) -> Callable[[Path], bytes]:
    def make(folder: Path) -> bytes:
        first, second = halves(suffix, codec, **options)(folder)
        return first + second[cut:]

    return make


def _joined_ahead(folder: Path) -> bytes:
    first, second = halves(".ts")(folder)
    return first + set_clock(second, lambda _: _HOUR)


def _joined_behind(folder: Path) -> bytes:
    first, second = halves(".ts")(folder)
    return set_clock(first, lambda _: _HOUR) + second


def _joined_of_two_sizes(folder: Path) -> bytes:
    first = encode(folder / "small.ts", range(HALF)).read_bytes()
    return first + encode(folder / "large.ts", range(HALF, WHOLE), size=(240, 400)).read_bytes()


def _ts(folder: Path, **options: Any) -> bytes:
    return encode(folder / "whole.ts", range(WHOLE), **options).read_bytes()


def _jumping_within_a_group(folder: Path) -> bytes:
    return set_clock(_ts(folder), lambda number: _HOUR if number >= KEYFRAME_EVERY + 7 else 0)


def _lying_once(folder: Path) -> bytes:
    return set_clock(_ts(folder), lambda number: 5 * _HOUR if number == KEYFRAME_EVERY + 7 else 0)


def _wrapping(folder: Path) -> bytes:
    return set_clock(_ts(folder), lambda _: 2**33 - 270000)


def _cut_within_a_group(folder: Path) -> bytes:
    packets = _ts(folder)
    return packets[188 * 20 :]


def _whole(suffix: str, codec: str = "libx264", **options: Any) -> Callable[[Path], bytes]:
    return lambda folder: encode(folder / f"whole{suffix}", range(WHOLE), codec, **options).read_bytes()


def _remuxed(folder: Path) -> bytes:
    whole = encode(folder / "whole.mkv", range(WHOLE))
    with av.open(whole) as source, av.open(folder / "again.ts", "w") as again:
        stream = source.streams.video[0]
        copy = again.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.size:
                packet.stream = copy
                again.mux(packet)
    return (folder / "again.ts").read_bytes()


def _begun_with(box: bytes) -> Callable[[Path], bytes]:
    return lambda folder: box + in_fragments(folder)


def _begun_with_index(folder: Path) -> bytes:
    whole = in_fragments(folder)
    return next(box for box in boxes(whole) if box[4:8] == b"sidx") + whole


def _box(name: bytes, size: int) -> bytes:
    return size.to_bytes(4) + name + bytes(size - 8)


@dataclass(frozen=True)
class Clock:
    """`first` is the number of the first frame that can be decoded, `joined_at` the frames before which clocks jump."""

    make: Callable[[Path], bytes]
    first: int = 0
    rate: Fraction | int = 30
    joined_at: tuple[int, ...] = ()


_B_FRAMES = {"bf": "2"}

JOINED = {
    "joined.ts": Clock(_joined(".ts"), joined_at=(HALF,)),
    "joined_open_gop.ts": Clock(_joined(".ts", "libx265"), joined_at=(HALF,)),
    "joined_ahead.ts": Clock(_joined_ahead, joined_at=(HALF,)),
    "joined_behind.ts": Clock(_joined_behind, joined_at=(HALF,)),
    "joined_of_two_sizes.ts": Clock(_joined_of_two_sizes, joined_at=(HALF,)),
    "joined.mpg": Clock(_joined(".mpg", "mpeg2video"), joined_at=(HALF,)),
    "joined.vob": Clock(_joined(".vob", "mpeg2video"), joined_at=(HALF,)),
    "joined.mkv": Clock(_joined(".mkv"), joined_at=(HALF,)),
    "joined.webm": Clock(_joined(".webm", "libvpx-vp9"), joined_at=(HALF,)),
    # Without the second header, which no reader of FLV goes beyond.
    "joined.flv": Clock(_joined(".flv", cut=13), joined_at=(HALF,)),
    "chained.ogv": Clock(_joined(".ogv", "libvpx"), joined_at=(HALF,)),
    "jumping_within_a_group.ts": Clock(_jumping_within_a_group, joined_at=(KEYFRAME_EVERY + 7,)),
    "lying_once.ts": Clock(_lying_once, joined_at=(KEYFRAME_EVERY + 7, KEYFRAME_EVERY + 8)),
    "joined.avi": Clock(_joined(".avi", "mpeg4", **_B_FRAMES)),
    "joined.h264": Clock(_joined(".h264")),
}

CLOCKS = JOINED | {
    "wrapping.ts": Clock(_wrapping),
    "cut_within_a_group.ts": Clock(_cut_within_a_group, first=KEYFRAME_EVERY),
    "off_by_some_bytes.ts": Clock(lambda folder: _ts(folder)[100:]),
    "after_something_else.ts": Clock(lambda folder: bytes(range(256)) * 4 + _ts(folder)),
    "30.mkv": Clock(_whole(".mkv")),
    "ntsc.mkv": Clock(_whole(".mkv", rate=NTSC), rate=NTSC),
    "60.webm": Clock(_whole(".webm", "libvpx-vp9", rate=60), rate=60),
    "30.flv": Clock(_whole(".flv")),
    "ntsc.flv": Clock(_whole(".flv", rate=NTSC), rate=NTSC),
    "30.wmv": Clock(_whole(".wmv", "mpeg4")),
    "ntsc.wmv": Clock(_whole(".wmv", "mpeg4", rate=NTSC), rate=NTSC),
    "mpeg4_b_frames.avi": Clock(_whole(".avi", "mpeg4", **_B_FRAMES)),
    "h264_b_frames.avi": Clock(_whole(".avi", **_B_FRAMES)),
    # Once in milliseconds, they stay rounded to those.
    "from_mkv.ts": Clock(_remuxed),
    "after_zeros.mpg": Clock(lambda folder: bytes(700) + _whole(".mpg", "mpeg2video")(folder)),
    "several_a_pack.mpg": Clock(_whole(".mpg", "mpeg2video")),
    "mpeg1.mpg": Clock(_whole(".mpg", "mpeg1video")),
    "h264.h264": Clock(_whole(".h264")),
    "hevc.hevc": Clock(_whole(".hevc", "libx265")),
    "mpeg2.m2v": Clock(_whole(".m2v", "mpeg2video")),
    "mpeg1.m1v": Clock(_whole(".m1v", "mpeg1video", muxer="mpeg1video")),
    "mpeg4.cmp": Clock(_whole(".cmp", "mpeg4", muxer="m4v", **_B_FRAMES)),
    # The stream tells no rate.
    "av1.obu": Clock(_whole(".obu", "libsvtav1"), rate=25),
    "vp9.ivf": Clock(_whole(".ivf", "libvpx-vp9")),
    "mpeg2.mxf": Clock(_whole(".mxf", "mpeg2video")),
    "h264_b_frames.mxf": Clock(_whole(".mxf", rate=NTSC, **_B_FRAMES), rate=NTSC),
    "sidx_first.mp4": Clock(_begun_with_index),
    "emsg_first.mp4": Clock(_begun_with(_box(b"emsg", 32))),
    "uuid_first.mp4": Clock(_begun_with(_box(b"uuid", 40))),
    "prft_first.mp4": Clock(_begun_with(_box(b"prft", 32))),
}


def make_clock(folder: Path, name: str) -> Path:
    path = folder / name
    path.write_bytes(CLOCKS[name].make(folder))
    return path
