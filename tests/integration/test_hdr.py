"""PQ and HLG come out in SDR where the curve of BT.2390 says."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from shutil import which

import numpy as np
import pytest

from keye.worker.media.job_media import DecoderPool
from tests.support.zoo import CLIP_SIZE
from tests.support.zoo_of_looks import colour_at, in_a_child, look_at, one_colour, write_clip

PQ, HLG = 16, 18


def pq_signal(light: float) -> float:
    """SMPTE ST 2084, of cd/m2."""
    power = (light / 10_000) ** 0.1593017578125
    return float(((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375)


def hlg_signal(light: float) -> float:
    """ARIB STD-B67 for a grey of so many cd/m2 on a screen of 1,000."""
    scene = (light / 1000) ** (1 / 1.2)
    return float((3 * scene) ** 0.5 if scene <= 1 / 12 else 0.17883277 * np.log(12 * scene - 0.28466892) + 0.55991073)


def light_by_bt2390(light: float) -> float:
    """The curve as its report writes it down, for a source of 1,000 cd/m2 on a screen of 203."""
    peak, most = pq_signal(1000), pq_signal(203) / pq_signal(1000)
    e1, knee = min(pq_signal(light) / peak, 1), 1.5 * most - 0.5
    if e1 < knee:
        return light
    t = (e1 - knee) / (1 - knee)
    e2 = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (-2 * t**3 + 3 * t**2) * most
    levels = np.linspace(0, 1000, 200_001)
    return float(np.interp(e2 * peak, [pq_signal(x) for x in levels[::50]], levels[::50]))


@pytest.mark.holds("docs/model.md#how-frames-look", "by the curve of BT.2390", "Diffuse white comes out at 230 of 255")
@pytest.mark.parametrize(("transfer", "signal_of"), [(PQ, pq_signal), (HLG, hlg_signal)])
@pytest.mark.parametrize("light", [0, 1, 26, 58, 100, 203, 400, 1000])
def test_hdr_greys_come_out_grey_and_where_the_curve_says(
    tmp_path: Path, transfer: int, signal_of: Callable[[float], float], light: float
) -> None:
    frames = one_colour([signal_of(light)] * 3, "BT.2020", "yuv420p10le", CLIP_SIZE)
    tags = {"color_trc": transfer, "colorspace": 9, "color_primaries": 9}
    seen = look_at(write_clip(tmp_path / "clip.mkv", frames, "ffv1", **tags))
    red, green, blue = colour_at(seen.frames[-1], (0.5, 0.5))
    assert max(red, green, blue) - min(red, green, blue) <= 1
    assert green == pytest.approx(255 * (light_by_bt2390(light) / 203) ** (1 / 2.4), abs=3)
    if light == 203:
        assert green == pytest.approx(230, abs=1)
    if light == 1000:
        assert green == 255


@pytest.mark.parametrize(("transfer", "signal_of"), [(PQ, pq_signal), (HLG, hlg_signal)])
def test_hdr_colours_leave_the_wide_gamut(tmp_path: Path, transfer: int, signal_of: Callable[[float], float]) -> None:
    """A red of BT.709, 50 cd/m2 where white has 203, as BT.2087 writes it in BT.2020."""
    wide = np.array([0.6274, 0.0691, 0.0164]) * 50
    if transfer == HLG:
        scene = wide * (np.dot(wide, [0.2627, 0.6780, 0.0593]) / 1000) ** (1 / 1.2 - 1) / 1000
        signal = [hlg_signal(1000 * value**1.2) for value in scene]
    else:
        signal = [pq_signal(value) for value in wide]
    frames = one_colour(signal, "BT.2020", "yuv444p12le", CLIP_SIZE)
    tags = {"color_trc": transfer, "colorspace": 9, "color_primaries": 9}
    seen = look_at(write_clip(tmp_path / "clip.mkv", frames, "ffv1", **tags))
    assert colour_at(seen.frames[-1], (0.5, 0.5)) == pytest.approx([255 * (50 / 203) ** (1 / 2.4), 0, 0], abs=12)


@pytest.mark.skipif(which("ffmpeg") is None, reason="ffmpeg is not installed")
@pytest.mark.parametrize(("codec", "pixel_format"), [("libx265", "yuv420p10le"), ("libvpx-vp9", "yuv420p")])
def test_colours_that_only_the_container_says_count(tmp_path: Path, codec: str, pixel_format: str) -> None:
    frames = one_colour([pq_signal(203), pq_signal(20), pq_signal(20)], "BT.2020", pixel_format, CLIP_SIZE)
    options = {"libx265": {"x265-params": "log-level=none:bframes=0:lossless=1"}}.get(codec, {"lossless": "1"})
    plain = write_clip(tmp_path / "plain.mp4", frames, codec, options=options)
    tags = ["-color_trc", "smpte2084", "-colorspace", "bt2020nc", "-color_primaries", "bt2020"]
    told = ["-c", "copy", *tags, "-movflags", "write_colr", str(tmp_path / "clip.mp4")]
    subprocess.run(["ffmpeg", "-v", "error", "-i", str(plain), *told], check=True)
    tags_of_stream = {"color_trc": PQ, "colorspace": 9, "color_primaries": 9}
    tagged = write_clip(tmp_path / "tagged.mkv", frames, "ffv1", **tags_of_stream)
    expected = colour_at(look_at(tagged).frames[0], (0.5, 0.5))
    assert colour_at(look_at(tmp_path / "clip.mp4").frames[0], (0.5, 0.5)) == pytest.approx(expected, abs=4)


def test_hdr_is_read_in_a_child_too(decoders: DecoderPool, tmp_path: Path) -> None:
    frames = one_colour([pq_signal(203)] * 3, "BT.2020", "yuv420p10le", CLIP_SIZE)
    tags = {"color_trc": PQ, "colorspace": 9, "color_primaries": 9}
    options = {"x265-params": "log-level=none:bframes=0", "preset": "ultrafast"}
    path = write_clip(tmp_path / "clip.mp4", frames, "libx265", options=options, **tags)
    assert colour_at(in_a_child(decoders, path).frames[0], (0.5, 0.5)) == pytest.approx([230] * 3, abs=3)
