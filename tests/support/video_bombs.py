"""Videos that are made to hurt whoever decodes them, none of them larger than a megabyte."""

import random
import struct
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np

from tests.support.image_bombs import gif, gif_frame
from tests.support.zoo import encode_clip, steady_times


def clip(folder: Path, suffix: str = "mp4") -> bytearray:
    return bytearray(encode_clip(folder / f"clip.{suffix}", steady_times(30)).read_bytes())


def with_count(folder: Path, box: bytes, count: int = 0x7FFFFFF0, offset: int = 8) -> bytes:
    """A table of a good clip that says to be as long as its field can say."""
    video = clip(folder)
    at = video.index(box) + offset
    video[at : at + 4] = struct.pack(">I", count)
    return bytes(video)


def box(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body) + 8) + kind + body


def nested(kind: bytes, depth: int) -> bytes:
    body = b""
    for _ in range(depth):
        body = box(kind, body)
    return box(b"ftyp", b"isom\0\0\0\0isom") + body


def with_edits(folder: Path, num_edits: int) -> bytes:
    """The list of edits is put at the end of the track, in place of the one there is."""
    video = clip(folder).replace(b"edts", b"free")
    edits = struct.pack(">II", 0, num_edits) + struct.pack(">IIHH", 1, 0, 1, 0) * num_edits
    added = box(b"edts", box(b"elst", edits))
    at = video.index(b"mdia") - 4
    video[at:at] = added
    for outer in (b"moov", b"trak"):
        start = video.index(outer) - 4
        video[start : start + 4] = struct.pack(">I", struct.unpack(">I", video[start : start + 4])[0] + len(added))
    return bytes(video)


def elsewhere(folder: Path) -> bytes:
    """Its samples are said to lie in another file."""
    video = clip(folder)
    at = video.index(b"url ")
    video[at : at + 8] = b"alis" + bytes(4)
    return bytes(video)


def motion_jpeg_of_4_gigapixels(folder: Path) -> bytes:
    """Each frame's own header lies; the container's is honest."""
    path = folder / "motion.avi"
    with av.open(path, "w") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuvj420p"
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8))))
        container.mux(stream.encode(None))
    return path.read_bytes().replace(b"\x08\x00\x40\x00\x40\x03", b"\x08\xff\xf0\xff\xf0\x03")


def element(identity: bytes, body: bytes, size: bytes | None = None) -> bytes:
    """Of Matroska. All ones is a size that nobody knows."""
    return identity + (size or struct.pack(">Q", len(body) | 1 << 56)) + body


def matroska(body: bytes) -> bytes:
    head = element(b"\x1a\x45\xdf\xa3", element(b"\x42\x82", b"matroska"))
    return head + element(b"\x18\x53\x80\x67", body, b"\x01" + b"\xff" * 7)


def large_frames(folder: Path) -> bytes:
    """8 megapixels each in a few hundred bytes."""
    path = folder / "large.mp4"
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 3840, 2160, "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.zeros((3240, 3840), np.uint8), "yuv420p")
        for _ in range(8):
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path.read_bytes()


def of_times(folder: Path, times: list[int], rate: int) -> bytes:
    path = folder / "times.mkv"
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for number, time in enumerate(times):
            for packet in stream.encode(av.VideoFrame(64, 64, "yuv420p")):
                packet.pts = packet.dts = time + number
                container.mux(packet)
    return path.read_bytes()


def garbage(folder: Path) -> bytes:
    """Packets of MPEG-TS with a good beginning each."""
    rng = random.Random(1)
    return b"".join(b"\x47" + rng.randbytes(187) for _ in range(5000))


def flash(_folder: Path) -> bytes:
    """Its notes hold lists of four billion within lists."""
    notes = b"\2\0\nonMetaData" + b"\x0a\xff\xff\xff\xff" * 99_999
    return b"FLV\1\1\0\0\0\x09\0\0\0\0\x12" + len(notes).to_bytes(3, "big") + bytes(7) + notes


def two_sizes(folder: Path) -> bytes:
    small = encode_clip(folder / "small.ts", steady_times(5)).read_bytes()
    return small + encode_clip(folder / "large.ts", steady_times(5), size=(480, 640)).read_bytes()


VIDEO_BOMBS: dict[str, Callable[[Path], bytes]] = {
    "4_gigapixels.avi": motion_jpeg_of_4_gigapixels,
    "4_gigapixels_moving.gif.mp4": lambda _: gif(gif_frame(), gif_frame(), width=65535, height=65535),
    "30000_frames.gif.mp4": lambda _: gif(*[gif_frame()] * 30_000),
    "samples.mp4": lambda folder: with_count(folder, b"stsz", offset=12),
    "times.mp4": lambda folder: with_count(folder, b"stts"),
    "times_of_a_billion_frames.mp4": lambda folder: with_count(folder, b"stts", offset=12),
    "frame_of_many_hours.mp4": lambda folder: with_count(folder, b"stts", 0x7FFFFFFF, offset=16),
    "offsets.mp4": lambda folder: with_count(folder, b"ctts"),
    "chunks.mp4": lambda folder: with_count(folder, b"stsc"),
    "places.mp4": lambda folder: with_count(folder, b"stco"),
    "keyframes.mp4": lambda folder: with_count(folder, b"stss"),
    "edits.mp4": lambda folder: with_edits(folder, 60_000),
    "scale_of_one.mp4": lambda folder: with_count(folder, b"mdhd", 1, offset=16),
    "descriptions.mp4": lambda folder: with_count(folder, b"stsd"),
    "deep.mp4": lambda _: nested(b"moov", 30_000),
    "deep_tracks.mp4": lambda _: nested(b"trak", 100_000),
    "elsewhere.mp4": elsewhere,
    "boxes.mp4": lambda _: box(b"ftyp", b"isom\0\0\0\0isom") + box(b"free", b"") * 120_000,
    "unknown_sizes.mkv": lambda _: matroska(element(b"\x1f\x43\xb6\x75", b"", b"\x01" + b"\xff" * 7) * 50_000),
    "void_of_petabytes.mkv": lambda _: matroska(b"\xec\x01\x7f\xff\xff\xff\xff\xff\xff" + bytes(5000)),
    "lace.mkv": lambda folder: bytes(clip(folder, "mkv")).replace(b"\xa3", b"\xa3\x06\xff\xff\xff", 20),
    "deep.mkv": lambda _: matroska(b"\x1c\x53\xbb\x6b\x01\xff\xff\xff\xff\xff\xff\xff" * 50_000),
    "index.avi": lambda folder: bytes(clip(folder, "avi")) + b"idx1\xff\xff\xff\x7f" + b"00dc\x10\0\0\0" * 60_000,
    "lists.avi": lambda _: b"RIFF\xff\xff\xff\x7fAVI " + b"LIST\xff\xff\xff\x7fhdrl" * 80_000,
    "garbage.ts": garbage,
    "two_sizes.ts": two_sizes,
    "metadata.flv": flash,
    "large_frames.mp4": large_frames,
    "before_time.mkv": lambda folder: of_times(folder, [-(10**9)] * 9 + [0] * 9, 30),
    "end_of_time.mkv": lambda folder: of_times(folder, [0] * 9 + [2**40] * 9, 30),
    "60000_a_second.mkv": lambda folder: of_times(folder, [0] * 30, 60_000),
    "playlist.mp4": lambda _: b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
    "concat.mp4": lambda _: b"ffconcat version 1.0\nfile /etc/passwd\n",
    "metadata.mp4": lambda _: b";FFMETADATA1\ntitle=x\n" + b"[CHAPTER]\n" * 50_000,
    "frames.y4m": lambda _: b"YUV4MPEG2 W99999 H99999 F30:1 Ip A1:1 C420\nFRAME\n",
    "session.sdp": lambda _: b"v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n",
}
