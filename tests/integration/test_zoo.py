"""Every kind of clip through the front door of media and a decoder child: no wrong frame in 64."""

import os
from pathlib import Path

import numpy as np
import pytest

from keye.config.job import VideoPart
from keye.config.settings import Settings
from keye.worker.media.job_media import DecodedVideo, DecoderPool, MediaCache, MediaLimits, decode, fetch
from keye.worker.sizing import Sizing
from tests.support.zoo import (
    CLIP_SIZE,
    CLIPS,
    Zoo,
    encode_clip,
    number_shown_at,
    shown_by_plain_decoding,
    upright_numbers,
)


@pytest.mark.parametrize("name", CLIPS)
def test_64_frames_of_every_kind_of_clip_are_the_ones_on_screen(
    zoo: Zoo, decoders: DecoderPool, tmp_path: Path, name: str
) -> None:
    shown = shown_by_plain_decoding(zoo[name], name)
    limits = MediaLimits.of(Settings(media_roots=(zoo[name].parent,)))
    height, width = CLIP_SIZE[::-1] if "turned" in name else CLIP_SIZE
    size = {"resized_height": height, "resized_width": width}
    sizing = Sizing(factor=2, min_pixels=1, max_pixels=height * width)
    for num_frames, stretch in ((64, {}), (6, {"start_seconds": 0.3 * max(shown.values())})):
        part = VideoPart(uri=str(zoo[name]), fps=60, max_frames=num_frames, **size, **stretch)
        fetched = fetch([part], limits, MediaCache(tmp_path, max_bytes=0))
        (decoded,) = decode([part], fetched, limits, sizing, decoders)
        assert isinstance(decoded, DecodedVideo)
        numbers = upright_numbers(decoded.frames, name)
        assert decoded.timestamps_seconds == pytest.approx([shown[number] for number in numbers], abs=1e-6)
        if not stretch:
            times = np.linspace(0, max(shown.values()), min(num_frames, len(shown)))
            assert numbers == [number_shown_at(time, shown) for time in times]
        assert decoded.frames_corrupt == 0


def test_no_clip_makes_what_is_started_after_it_a_real_time_process(tmp_path: Path) -> None:
    encode_clip(tmp_path / "av1.mp4", [0.0], "libsvtav1")
    assert os.sched_getscheduler(0) != os.SCHED_FIFO
