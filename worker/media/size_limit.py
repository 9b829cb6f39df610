"""The limits on bytes and pixels, each checked before what it limits is read or made."""

from keye.config.outcome import ErrorCode
from keye.worker.media.fault import MediaFault


def check_size(num_bytes: int, max_bytes: int, name: str) -> None:
    if num_bytes == 0:
        raise MediaFault(ErrorCode.MEDIA_CORRUPT, f"{name}: is empty (0 bytes).")
    if num_bytes > max_bytes:
        raise MediaFault(
            ErrorCode.MEDIA_TOO_LARGE,
            f"{name}: has {num_bytes:,} bytes, the limit is {max_bytes:,}. Send a smaller file.",
        )


def check_pixels(width: int, height: int, name: str, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise MediaFault(
            ErrorCode.MEDIA_TOO_LARGE,
            f"{name}: has {width} x {height} = {width * height / 1e6:.1f} megapixels, "
            f"the limit is {max_pixels / 1e6:.1f} (KEYE_MAX_IMAGE_PIXELS). Send a smaller one.",
        )


def check_decoded_bytes(num_bytes: int, bytes_left: int, name: str) -> None:
    if num_bytes > bytes_left:
        raise MediaFault(
            ErrorCode.MEDIA_TOO_LARGE,
            f"{name}: would take {num_bytes / 2**20:,.0f} MiB of pixels, of which this job has "
            f"{bytes_left / 2**20:,.0f} left. Send fewer or smaller media, or set max_frames or max_pixels.",
        )
