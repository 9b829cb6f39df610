"""How much of a medium is read and decoded, and from where. The caller makes it from its settings."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class MediaLimits:
    """`max_image_pixels` also bounds one frame of a video; `max_decoded_bytes` bounds all pixels of one job."""

    roots: tuple[Path, ...]
    s3_endpoint_url: str | None
    fetch_timeout_seconds: float
    max_image_bytes: int
    max_image_pixels: int
    max_video_bytes: int
    max_decoded_bytes: int = 4 * 2**30
