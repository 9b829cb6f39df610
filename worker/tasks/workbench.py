"""What all attempts of a process work with."""

from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Any, Self

from keye.config.outcome import ModelIdentity, WorkerIdentity
from keye.config.settings import Settings
from keye.worker.engine.inbox import Inbox
from keye.worker.media.job_media import DecoderPool, MediaCache, MediaLimits
from keye.worker.results.event_writer import EventWriter
from keye.worker.tasks.lookahead import Lookahead

if TYPE_CHECKING:
    from keye.worker.model.processor import KeyeProcessor


@dataclass(frozen=True, slots=True)
class Workbench:
    """Engine, decoders and limits; how long jobs of newer releases are left to others, and unreachable media tried."""

    inbox: Inbox
    processor: "KeyeProcessor"
    sampling: dict[str, Any]
    media_limits: MediaLimits
    media_cache: MediaCache
    decoders: DecoderPool
    lookahead: Lookahead
    events: EventWriter
    model: ModelIdentity
    worker: WorkerIdentity
    max_generate_seconds: float = inf
    max_attempt_seconds: float = inf
    newer_job_seconds: float = 0
    media_retry_seconds: float = 0

    @classmethod
    def of(cls, settings: Settings, **made: Any) -> Self:
        """As settings have it; `made` are the fields that they say nothing of."""
        return cls(
            media_limits=MediaLimits.of(settings),
            media_cache=MediaCache(settings.cache_folder, settings.cache_bytes),
            lookahead=Lookahead(settings.decoders),
            max_generate_seconds=settings.max_generate_seconds,
            max_attempt_seconds=settings.max_attempt_seconds,
            newer_job_seconds=settings.newer_job_seconds,
            media_retry_seconds=settings.media_retry_seconds,
            **made,
        )
