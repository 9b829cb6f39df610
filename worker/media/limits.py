"""How much of a medium is read and decoded, and from where."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self

from keye.config.settings import Settings, VideoDecoder


@dataclass(frozen=True, slots=True)
class MediaLimits:
    """`max_image_pixels` also bounds one frame of a video; `max_decoded_bytes` bounds all pixels of one job.

    `fetch_timeout_seconds` bounds each silence of a store or server, `max_fetch_seconds` one whole download. No
    `s3_buckets` means any bucket that the credentials open. Videos read at less than `min_frames_per_second` are
    told of.
    """

    media_roots: tuple[Path, ...]
    s3_endpoint_url: str | None
    fetch_timeout_seconds: float
    max_image_bytes: int
    max_image_pixels: int
    max_video_bytes: int
    max_decoded_bytes: int
    max_fetch_seconds: float
    s3_buckets: tuple[str, ...]
    allow_https: bool
    min_frames_per_second: float
    video_decoder: VideoDecoder

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """Each as the setting of its name."""
        return cls(**{field.name: getattr(settings, field.name) for field in fields(cls)})
