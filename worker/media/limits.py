"""How much of a medium is read and decoded, and from where; each limit is checked before anything is read or made."""

from dataclasses import dataclass, fields
from typing import Self

from keye.config.settings import Settings
from keye.worker.media.faults import corrupt, too_large
from keye.worker.media.media_roots import MediaRoots


@dataclass(frozen=True, slots=True)
class MediaLimits:
    """`max_image_pixels` also bounds one frame of a video; `max_decoded_bytes` bounds all pixels of one job.

    `fetch_timeout_seconds` bounds each silence of a store or server, `max_fetch_seconds` one whole download. No
    `s3_buckets` means any bucket that the credentials open, no `https_hosts` any public host. Videos read at less than
    `min_frames_per_second` are told of.
    """

    media_roots: MediaRoots
    s3_endpoint_url: str | None
    fetch_timeout_seconds: float
    max_image_bytes: int
    max_image_pixels: int
    max_image_cpu_seconds: int
    max_video_bytes: int
    max_decoded_bytes: int
    max_fetch_seconds: float
    s3_buckets: tuple[str, ...]
    allow_https: bool
    https_hosts: tuple[str, ...]
    min_frames_per_second: float

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """Each as the setting of its name; the media roots as they are at this moment."""
        given = {field.name: getattr(settings, field.name) for field in fields(cls)}
        return cls(**given | {"media_roots": MediaRoots(settings.media_roots)})


def check_size(num_bytes: int, max_bytes: int) -> None:
    if num_bytes == 0:
        raise corrupt("is empty (0 bytes).")
    if num_bytes > max_bytes:
        raise too_large(f"has {num_bytes:,} bytes, the limit is {max_bytes:,}. Send a smaller file.")


def check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise too_large(
            f"has {width} x {height} = {width * height / 1e6:.1f} megapixels, "
            f"the limit is {max_pixels / 1e6:.1f} (KEYE_MAX_IMAGE_PIXELS). Send a smaller one."
        )


def check_decoded_bytes(num_bytes: int, bytes_left: int) -> None:
    if num_bytes > bytes_left:
        raise too_large(
            f"would take {num_bytes / 2**20:,.0f} MiB of pixels, of which this job has "
            f"{bytes_left / 2**20:,.0f} left. Send fewer or smaller media, or set max_frames or max_pixels."
        )
