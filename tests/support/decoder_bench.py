"""A pool of decoder children with media for it, as tests of what ails them need it."""

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from PIL import Image

from keye.config.faults import Fault
from keye.config.job import ImagePart, VideoPart
from keye.config.settings import Settings
from keye.worker.media.decode.decoder import DecodingOrder
from keye.worker.media.decode.pixel_budget import PixelShare
from keye.worker.media.decode.pool import DecoderPool
from keye.worker.media.decoded import DecodedImage, DecodedVideo
from keye.worker.media.faults import named
from keye.worker.media.limits import MediaLimits
from keye.worker.sizing import Sizing
from tests.support.decoder_children import children_of
from tests.support.zoo import draw_quarters, encode_clip, read_number, steady_times

CLIP_BYTES = 30 * 96 * 160 * 3
# Shows both media as they are.
SIZING = Sizing(factor=2, min_pixels=4, max_pixels=96 * 160)


def handles() -> dict[str, str]:
    """What this process holds open, by number."""
    held = {}
    for handle in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the one that lists them
            held[handle] = os.readlink(f"/proc/self/fd/{handle}")
    return held


class Pool(DecoderPool):
    """Calls `before_allocating` while a child waits for memory: it cannot be done before that is."""

    before_allocating: Callable[[], object] = staticmethod(lambda: None)

    def _allocate(self, *asked: Any) -> Any:
        self.before_allocating()
        return super()._allocate(*asked)


class Bench:
    """A pool and two media for it."""

    def __init__(self, pool: Pool, folder: Path, others: set[int]) -> None:
        self.pool = pool
        self.clip = encode_clip(folder / "clip.mp4", steady_times(30))
        self.photo = folder / "photo.png"
        Image.fromarray(draw_quarters()).save(self.photo)
        self._others = others

    @property
    def children(self) -> set[int]:
        return children_of(os.getpid()) - self._others

    @property
    def child(self) -> int:
        (pid,) = self.children
        return pid

    def decode(
        self,
        path: Path,
        share: PixelShare | None = None,
        on_frame: Callable[[int, int], None] = lambda done, total: None,
        check: Callable[[], None] = lambda: None,
        limits: Mapping[str, int] = MappingProxyType({}),
        **others: Any,
    ) -> DecodedImage | DecodedVideo:
        part = VideoPart(uri=str(path), fps=30) if path.suffix == ".mp4" else ImagePart(uri=str(path))
        limited = {"max_image_pixels": 10**6, "max_decoded_bytes": 2**24, **limits}
        with path.open("rb") as file, named(path.name):
            order = DecodingOrder(
                part=part,
                file=file,
                limits=MediaLimits.of(Settings(**limited)),
                on_frame=on_frame,
                check=check,
                **{"sizing": SIZING, **others},
            )
            if share is not None:
                return self.pool.decode(order, share)
            with self.pool.share() as share:
                return self.pool.decode(order, share)

    def decode_clip(self, **options: object) -> DecodedVideo:
        video = self.decode(self.clip, **options)  # type: ignore[arg-type]
        assert isinstance(video, DecodedVideo)
        return video

    def blame(self, **options: object) -> Fault:
        with pytest.raises(Fault) as caught:
            self.decode_clip(**options)
        return caught.value

    def assert_works(self) -> None:
        assert [read_number(frame) for frame in self.decode_clip().frames] == list(range(30))
