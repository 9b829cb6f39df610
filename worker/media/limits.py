"""How much of a medium is read and decoded, and from where. The caller makes it from its settings."""

from dataclasses import dataclass
from pathlib import Path

from config.settings import VideoDecoder


@dataclass(frozen=True, slots=True)
class MediaLimits:
    """`max_image_pixels` also bounds one frame of a video; `max_decoded_bytes` bounds all pixels of one job.

    `fetch_timeout_seconds` bounds each silence of a store or server, `max_fetch_seconds` one whole download. No
    `s3_buckets` means any bucket that the credentials open. Videos read at less than `min_frames_per_second` are
    told of.
    """

    roots: tuple[Path, ...]
    s3_endpoint_url: str | None
    fetch_timeout_seconds: float
    max_image_bytes: int
    max_image_pixels: int
    max_video_bytes: int
    max_decoded_bytes: int = 4 * 2**30
    max_fetch_seconds: float = 600.0
    s3_buckets: tuple[str, ...] = ()
    allow_https: bool = False
    min_frames_per_second: float = 0.5
    video_decoder: VideoDecoder = "pyav"
