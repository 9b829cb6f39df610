"""The process that makes one thumbnail: of the file on its standard input, to its standard output. It opens nothing.

A script of its own, which loads nothing of ours and so starts at once. Ends with one of the numbers below.
"""

import io
import signal
import sys
from contextlib import suppress
from typing import Any, BinaryIO

# For a picture of as many pixels, and for a process that its parent no longer watches.
MEMORY_BYTES, CPU_SECONDS = 2 * 2**30, 20
MAX_PIXELS = 100_000_000

DAMAGED, TOO_LARGE = 1, 3


class _TooLarge(Exception):
    pass


def main(media_type: str, name: str, side: int, max_bytes: int) -> None:
    """`name` is the format for Pillow, or the demuxer for FFmpeg: none is guessed from what the file says."""
    confine()
    read = _read_image if media_type == "image" else _read_video
    code = DAMAGED
    try:
        picture = read(open(0, "rb"), name, side)  # noqa: SIM115
        sys.stdout.buffer.write(_jpeg(picture, max_bytes))
        return
    except (_TooLarge, MemoryError):
        code = TOO_LARGE
    except Exception:
        # Readers raise whatever they meet.
        pass
    sys.exit(code)


def confine() -> None:
    _limit("AS", MEMORY_BYTES)
    _limit("CPU", CPU_SECONDS)
    _limit("FSIZE", 0)
    _limit("CORE", 0)


def open_no_more() -> None:
    """From now on: no file, no socket, nor anything that is loaded only when it is needed."""
    _limit("NOFILE", 0)


def _limit(what: str, most: int) -> None:
    # Not at the top: whoever starts this process on another system reads the numbers above all the same.
    import resource

    # Some systems know it and take none.
    with suppress(OSError, ValueError):
        resource.setrlimit(getattr(resource, f"RLIMIT_{what}"), (most, most))


def _read_image(file: BinaryIO, name: str, side: int) -> Any:
    # What Pillow loads for a GIF, and for what else is in a JPEG.
    import copy  # noqa: F401

    from PIL import Image, ImageOps, MpoImagePlugin, TiffImagePlugin  # noqa: F401

    # Those that are common come alone, in half of the time.
    Image.preinit()
    if name not in Image.OPEN:
        Image.init()
    if name == "HEIF":
        from pillow_heif import register_heif_opener

        register_heif_opener()
    Image.MAX_IMAGE_PIXELS = None
    open_no_more()
    image: Image.Image = Image.open(file, formats=[name])
    _check(*image.size)
    if not image.mode.startswith("I") and image.mode != "F":
        # Of a JPEG, no more than that is decoded.
        image.thumbnail((side, side))
    else:
        # 16 bits a channel, of which Pillow would cut all above 8.
        image = image.convert("F").point(lambda value: value * (1 / 256)).convert("L")
        image.thumbnail((side, side))
    with suppress(Exception):
        # What a damaged note says is passed over.
        image = ImageOps.exif_transpose(image)
    return image


def _read_video(file: BinaryIO, name: str, side: int) -> Any:
    import av
    import av.subtitles.stream
    from PIL import Image

    Image.preinit()
    open_no_more()
    with av.open(file, "r", format=name, metadata_errors="ignore") as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        _check(stream.codec_context.width, stream.codec_context.height)
        frame: Any = None
        # Videos often begin in the dark; not all can be sought in, and not all say truly how long they are.
        for start in (container.duration // 10, 0, None) if container.duration else (None,):
            with suppress(av.FFmpegError, StopIteration):
                if start is not None:
                    container.seek(start)
                frame = next(container.decode(stream))
                break
        if frame is None:
            raise EOFError
        _check(frame.width, frame.height)
        ratio = float(stream.sample_aspect_ratio or 1)
        width, height = max(1.0, frame.width * min(ratio, 100.0)), frame.height
        scale = min(1.0, side / max(width, height))
        image = frame.to_image(width=max(1, round(width * scale)), height=max(1, round(height * scale)))
        return image.rotate(frame.rotation, expand=True)


def _check(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise _TooLarge


def _jpeg(image: Any, max_bytes: int) -> bytes:
    """On white, and without a word of what else was in the file, such as where it was taken."""
    from PIL import Image

    image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    picture = Image.new("RGB", image.size, "white")
    picture.paste(image, mask=image if image.mode == "RGBA" else None)
    for quality in (80, 60, 40, 20):
        picture.save(file := io.BytesIO(), "JPEG", quality=quality)
        if file.tell() <= max_bytes:
            return file.getvalue()
    raise _TooLarge


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
