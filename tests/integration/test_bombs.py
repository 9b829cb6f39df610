"""Small files that claim to be huge end as errors, in little time and memory, and leave their decoder at work."""

import io
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from keye.config.codes import ErrorCode
from keye.config.faults import Fault
from keye.config.job import ImagePart, VideoPart
from keye.config.settings import Settings
from keye.worker.media.decode.decoder import DecodingOrder
from keye.worker.media.decode.pool import DecoderPool
from keye.worker.media.limits import MediaLimits
from keye.worker.sizing import Sizing
from tests.support.zoo import encode_clip, steady_times

MAX_PIXELS = 100_000_000
MAX_SECONDS = 5.0
MAX_GROWTH_BYTES = 200 * 10**6


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", header), *chunks, (b"IEND", b"")):
        content += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return content


def zeros(num_bytes: int) -> bytes:
    return zlib.compress(bytes(num_bytes), 9)


def saved(kind: str, size: tuple[int, int] = (16, 16), **options: object) -> bytearray:
    file = io.BytesIO()
    Image.new("RGB", size).save(file, kind, **options)
    return bytearray(file.getvalue())


def png_of_400_megapixels(_folder: Path) -> bytes:
    return png(20_000, 20_000, (b"IDAT", zeros(100 * 2**20)))


def png_with_endless_text(_folder: Path) -> bytes:
    text = b"note\0\0" + zeros(60 * 2**20)
    return png(16, 16, *[(b"zTXt", text)] * 8, (b"IDAT", zeros(1000)))


def png_with_huge_profile(_folder: Path) -> bytes:
    return png(16, 16, (b"iCCP", b"icc\0\0" + zeros(400 * 2**20)), (b"IDAT", zeros(100)))


def gif_of_4_gigapixels(_folder: Path) -> bytes:
    gif = saved("GIF")
    gif[6:10] = struct.pack("<HH", 65535, 65535)
    return bytes(gif)


def tiff_of_3_gigapixels(_folder: Path) -> bytes:
    """The tags for width and height are overwritten in place."""
    tiff = saved("TIFF", compression="tiff_deflate")
    for tag in (256, 257):
        at = tiff.index(struct.pack("<HHI", tag, 4, 1)) if struct.pack("<HHI", tag, 4, 1) in tiff else None
        at = at if at is not None else tiff.index(struct.pack("<HHI", tag, 3, 1))
        tiff[at : at + 12] = struct.pack("<HHII", tag, 4, 1, 60_000)
    return bytes(tiff)


def tiff_with_strips_of_gigabytes(_folder: Path) -> bytes:
    tiff = saved("TIFF", compression="tiff_deflate")
    at = tiff.index(struct.pack("<H", 279))
    tiff[at : at + 12] = struct.pack("<HHII", 279, 4, 1, 0xFFFFFFF0)
    return bytes(tiff)


def webp_of_268_megapixels(_folder: Path) -> bytes:
    webp = saved("WEBP", lossless=True)
    canvas = struct.pack("<I", 10) + bytes(4) + (16382).to_bytes(3, "little") * 2
    return b"RIFF" + struct.pack("<I", len(webp) + 14) + b"WEBPVP8X" + canvas + bytes(webp[12:])


def moving_gif_of_4_gigapixels(_folder: Path) -> bytes:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    gif = bytearray(file.getvalue())
    gif[6:10] = struct.pack("<HH", 65535, 65535)
    return bytes(gif)


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


def clip_of_a_billion_samples(folder: Path) -> bytes:
    """Its table says that all samples have one byte, and that there are as many as fit the field."""
    clip = bytearray(encode_clip(folder / "clip.mp4", steady_times(30)).read_bytes())
    at = clip.index(b"stsz") + 8
    clip[at : at + 8] = struct.pack(">II", 1, 0x7FFFFFF0)
    at = clip.index(b"stsc") + 12
    clip[at + 4 : at + 8] = struct.pack(">I", 0x7FFFFFF0)
    return bytes(clip)


BOMBS: dict[str, Callable[[Path], bytes]] = {
    "png_of_400_megapixels.png": png_of_400_megapixels,
    "png_with_endless_text.png": png_with_endless_text,
    "png_with_huge_profile.png": png_with_huge_profile,
    "gif_of_4_gigapixels.gif": gif_of_4_gigapixels,
    "tiff_of_3_gigapixels.tiff": tiff_of_3_gigapixels,
    "tiff_with_strips_of_gigabytes.tiff": tiff_with_strips_of_gigabytes,
    "webp_of_268_megapixels.webp": webp_of_268_megapixels,
    "moving_gif_of_4_gigapixels.mp4": moving_gif_of_4_gigapixels,
    "motion_jpeg_of_4_gigapixels.avi": motion_jpeg_of_4_gigapixels,
    "clip_of_a_billion_samples.mp4": clip_of_a_billion_samples,
}


def peaks_of_children() -> dict[int, int]:
    """The most bytes that each decoder child of this process has ever held."""
    peaks = {}
    for task in Path("/proc/self/task").iterdir():
        for child in (task / "children").read_text().split():
            if b"keye.worker.media.decode.child" in Path(f"/proc/{child}/cmdline").read_bytes():
                status = Path(f"/proc/{child}/status").read_text()
                peaks[int(child)] = 1024 * int(status.split("VmHWM:")[1].split()[0])
    return peaks


def decode(pool: DecoderPool, path: Path) -> None:
    part = VideoPart(uri="file:") if path.suffix in (".mp4", ".avi") else ImagePart(uri="file:")
    with path.open("rb") as file, pool.share() as share:
        order = DecodingOrder(
            part=part,
            file=file,
            limits=MediaLimits.of(Settings(max_image_pixels=MAX_PIXELS, max_decoded_bytes=2**30)),
            sizing=Sizing(factor=1, min_pixels=1, max_pixels=MAX_PIXELS),
            on_frame=lambda done, total: None,
            check=lambda: None,
        )
        pool.decode(order, share)


@pytest.mark.parametrize("name", BOMBS)
def test_bomb_ends_as_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "good.png").write_bytes(saved("PNG"))
    bomb = tmp_path / name
    bomb.write_bytes(BOMBS[name](tmp_path))
    assert bomb.stat().st_size < 2**20
    with DecoderPool(1, silence_seconds=20, max_decoded_bytes=2**30) as pool:
        decode(pool, tmp_path / "good.png")
        before = peaks_of_children()
        began = time.monotonic()
        with pytest.raises(Fault) as caught:
            decode(pool, bomb)
        seconds = time.monotonic() - began
        assert caught.value.code in (ErrorCode.MEDIA_TOO_LARGE, ErrorCode.MEDIA_CORRUPT)
        assert seconds < MAX_SECONDS
        after = peaks_of_children()
        assert after.keys() == before.keys(), "the child did not live to tell what it took"
        assert all(after[child] - before[child] < MAX_GROWTH_BYTES for child in after)
        decode(pool, tmp_path / "good.png")
