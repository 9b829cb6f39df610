"""Frames of clips look as a player shows them: which way up, on what, of which track, how wide, in which colours."""

import subprocess
from fractions import Fraction
from pathlib import Path
from shutil import which

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image

from keye.config.faults import Fault
from keye.worker.media.job_media import DecoderPool
from tests.support.zoo import (
    CLIP_SIZE,
    draw_frame,
    draw_quarters,
    encode_clip,
    read_number,
    read_quarters,
    steady_times,
)
from tests.support.zoo_of_looks import (
    SEEN_ON_WHITE,
    colour_at,
    in_a_child,
    look_at,
    one_colour,
    partly_transparent,
    quarters,
    transparent_numbers,
    turn,
    write_clip,
    write_tracks,
    write_with_sei,
)

ORIENTATIONS = [(degrees, is_mirrored) for degrees in (0, 90, 180, 270) for is_mirrored in (False, True)]
LOSSLESS = {"libx264": {"qp": "0", "preset": "ultrafast"}, "libvpx-vp9": {"lossless": "1"}}


@pytest.mark.holds("docs/model.md#how-frames-look", "turned and mirrored")
@pytest.mark.parametrize("rotation", ORIENTATIONS)
@pytest.mark.parametrize("name", ["clip.mp4", "clip.mov", "clip.mkv"])
def test_every_orientation_comes_out_upright(tmp_path: Path, name: str, rotation: tuple[int, bool]) -> None:
    seen = look_at(write_clip(tmp_path / name, quarters(), "libx264", rotation=rotation))
    expected = turn(draw_quarters(), rotation)
    assert seen.original_size == expected.shape[:2] == seen.frames.shape[1:3]
    assert read_quarters(seen.frames[-1]) == read_quarters(expected)


@pytest.mark.parametrize("rotation", ORIENTATIONS)
def test_orientation_in_the_stream_itself_counts_where_the_container_has_none(
    tmp_path: Path, rotation: tuple[int, bool]
) -> None:
    seen = look_at(write_with_sei(tmp_path / "clip.ts", rotation))
    flipped = draw_quarters()[:, :: -1 if rotation[1] else 1]
    assert read_quarters(seen.frames[0]) == read_quarters(np.rot90(flipped, rotation[0] // 90))


def test_matrix_that_also_scales_turns_and_mirrors(tmp_path: Path) -> None:
    matrix = [0, -(2 << 16), 0, -(2 << 16), 0, 0, 0, 0, 1 << 30]
    seen = look_at(write_clip(tmp_path / "clip.mp4", quarters(), "libx264", matrix=matrix))
    assert read_quarters(seen.frames[0]) == read_quarters(turn(draw_quarters(), (90, True)))


@pytest.mark.holds("docs/model.md#how-frames-look", "slanted ones go to the nearest")
@pytest.mark.parametrize(("slanted", "nearest"), [(80, 90), (10, 0), (-100, 270)])
def test_slanted_clip_is_shown_in_the_nearest_orientation(tmp_path: Path, slanted: int, nearest: int) -> None:
    seen = look_at(write_clip(tmp_path / "clip.mp4", quarters(), "libx264", rotation=(slanted, False)))
    assert read_quarters(seen.frames[0]) == read_quarters(turn(draw_quarters(), (nearest, False)))


def test_damaged_first_frame_does_not_lose_the_orientation(tmp_path: Path) -> None:
    path = encode_clip(tmp_path / "clip.mp4", steady_times(12), "mpeg4", rotation=90, keyframe_every=100)
    with av.open(path) as container:
        first = next(container.demux(video=0))
        position, size = first.pos, first.size
    content = bytearray(path.read_bytes())
    assert position is not None
    content[position : position + size] = bytes(size)
    path.write_bytes(content)
    assert look_at(path).original_size == CLIP_SIZE[::-1]


TRANSPARENT = [
    ("clip.webm", "libvpx-vp9", "yuva420p"),
    ("clip.webm", "libvpx", "yuva420p"),
    ("clip.mkv", "libvpx-vp9", "yuva420p"),
    ("clip.mov", "prores_ks", "yuva444p10le"),
    ("clip.mov", "qtrle", "argb"),
    ("clip.mov", "png", "rgba"),
    ("clip.mov", "png", "rgba64be"),
    ("clip.mov", "rawvideo", "argb"),
    ("clip.mkv", "ffv1", "yuva420p"),
    ("clip.mkv", "ffv1", "bgra"),
    ("clip.avi", "utvideo", "gbrap"),
    ("clip.avi", "rawvideo", "bgra"),
]


@pytest.mark.holds("docs/model.md#how-frames-look", "What is transparent is white")
@pytest.mark.parametrize(("name", "codec", "pixel_format"), TRANSPARENT)
def test_what_is_transparent_is_white(tmp_path: Path, name: str, codec: str, pixel_format: str) -> None:
    options = {"auto-alt-ref": "0"} if "vpx" in codec else {}
    seen = look_at(write_clip(tmp_path / name, partly_transparent(pixel_format), codec, options=options))
    for place, colour in SEEN_ON_WHITE.items():
        assert colour_at(seen.frames[-1], place) == pytest.approx(colour, abs=6)


@pytest.mark.parametrize(("name", "codec"), [("clip.webm", "libvpx-vp9"), ("clip.webm", "libvpx"), ("clip.mov", "png")])
def test_transparent_numbers_are_read_in_a_child_near_and_far(
    decoders: DecoderPool, tmp_path: Path, name: str, codec: str
) -> None:
    options = {"auto-alt-ref": "0", "g": "20", "deadline": "realtime", "cpu-used": "8"} if "vpx" in codec else {}
    pixel_format = "yuva420p" if "vpx" in codec else "rgba"
    path = write_clip(tmp_path / name, transparent_numbers(120, pixel_format), codec, options=options)
    for num_frames in (3, 60):
        seen = in_a_child(decoders, path, fps=10, max_frames=num_frames)
        expected = [round(10 * time) for time in seen.timestamps_seconds]
        assert [read_number(frame) for frame in seen.frames] == expected
        assert len(set(expected)) == num_frames


def test_gif_sent_as_a_video_is_seen_on_white(tmp_path: Path) -> None:
    frames = []
    for number in (1, 2, 3):
        picture = np.zeros((*CLIP_SIZE, 4), np.uint8)
        picture[..., 3] = np.where(draw_frame(number)[..., 0] > 128, 0, 255)
        frames.append(Image.fromarray(picture))
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:], duration=250, disposal=2)
    assert {read_number(frame) for frame in look_at(tmp_path / "clip.gif").frames} == {1, 2, 3}


def test_fourth_byte_of_uncompressed_avi_that_is_zero_throughout_is_no_alpha(tmp_path: Path) -> None:
    picture = np.dstack([draw_quarters(), np.zeros((64, 96), np.uint8)])
    frames = [av.VideoFrame.from_ndarray(picture, "rgba").reformat(format="bgra")]
    seen = look_at(write_clip(tmp_path / "clip.avi", frames, "rawvideo"))
    assert read_quarters(seen.frames[0]) == ["red", "green", "blue", "yellow"]


DEFAULT, NONE = int(Disposition.default), 0
IMPAIRED = int(Disposition.visual_impaired)


@pytest.mark.holds("docs/model.md#how-frames-look", "marked as the default")
@pytest.mark.parametrize(
    ("marks", "played"),
    [
        ((NONE, DEFAULT), 1),
        ((DEFAULT, NONE), 0),
        ((DEFAULT, DEFAULT), 0),
        ((NONE, NONE, DEFAULT), 2),
        ((DEFAULT | IMPAIRED, DEFAULT), 1),
        ((int(Disposition.attached_pic), DEFAULT), 1),
    ],
)
@pytest.mark.parametrize("name", ["clip.mkv", "clip.mp4"])
def test_track_that_a_player_plays_is_read(tmp_path: Path, name: str, marks: tuple[int, ...], played: int) -> None:
    if name == "clip.mp4" and marks[0] & ~DEFAULT:
        pytest.skip("MP4 has no such mark")
    tracks = [(100 + number, {"disposition": Disposition(mark)}) for number, mark in enumerate(marks)]
    seen = look_at(write_tracks(tmp_path / name, tracks))
    assert {read_number(frame) for frame in seen.frames} == {100 + played}


def test_poster_that_is_a_track_like_others_is_not_what_is_played(tmp_path: Path) -> None:
    tracks = [(number, {"disposition": Disposition.default}) for number in (100, 101)]
    seen = look_at(write_tracks(tmp_path / "clip.mp4", tracks, length_of_first=1))
    assert {read_number(frame) for frame in seen.frames} == {101}


@pytest.mark.holds("docs/model.md#how-frames-look", "stretched to square ones")
@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("clip.mp4", "libx264"),
        ("clip.mkv", "libx264"),
        ("clip.avi", "mpeg4"),
        ("clip.ts", "libx264"),
        ("clip.mov", "png"),
    ],
)
def test_pixels_that_are_not_square_are_stretched_in_width(tmp_path: Path, name: str, codec: str) -> None:
    pixel_format = "rgb24" if codec == "png" else "yuv420p"
    frames = [av.VideoFrame.from_ndarray(draw_frame(341)).reformat(format=pixel_format) for _ in range(3)]
    seen = look_at(write_clip(tmp_path / name, frames, codec, aspect=Fraction(64, 45)))
    assert seen.original_size == seen.frames.shape[1:3] == (96, round(160 * 64 / 45))
    assert read_number(seen.frames[0]) == 341


def test_turned_clip_is_stretched_along_its_stored_rows(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mp4", quarters(), "libx264", aspect=Fraction(2, 1), rotation=(90, True))
    seen = look_at(path)
    assert seen.original_size == (192, 64)
    assert read_quarters(seen.frames[0]) == read_quarters(turn(draw_quarters(), (90, True)))


@pytest.mark.holds("docs/model.md#how-frames-look", "more than ten times as wide as high")
@pytest.mark.parametrize(("aspect", "width"), [(Fraction(1, 2), 48), (Fraction(10), 960), (Fraction(11), 96)])
def test_absurd_shapes_of_pixels_are_passed_over(tmp_path: Path, aspect: Fraction, width: int) -> None:
    seen = look_at(write_clip(tmp_path / "clip.mp4", quarters(), "libx264", aspect=aspect))
    assert seen.original_size == (64, width)


def test_container_has_the_last_word_on_the_shape_of_pixels(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mp4", quarters(), "libx264", aspect=Fraction(4, 3))
    whole = path.read_bytes()
    written = b"pasp" + (4).to_bytes(4) + (3).to_bytes(4)
    assert written in whole
    for said, width in (((2, 1), 192), ((0, 0), 128), ((1000, 1), 96)):
        path.write_bytes(whole.replace(written, b"pasp" + said[0].to_bytes(4) + said[1].to_bytes(4)))
        assert look_at(path).original_size == (64, width)


@pytest.mark.skipif(which("ffmpeg") is None, reason="ffmpeg is not installed")
def test_display_size_of_matroska_counts(tmp_path: Path) -> None:
    plain = write_clip(tmp_path / "plain.mkv", quarters(), "ffv1")
    copied = ["-c", "copy", "-aspect", "16:9", str(tmp_path / "clip.mkv")]
    subprocess.run(["ffmpeg", "-v", "error", "-i", str(plain), *copied], check=True)
    height, width = look_at(tmp_path / "clip.mkv").original_size
    assert (height, width) == (64, pytest.approx(64 * 16 / 9, abs=1))


def test_limit_holds_for_the_stretched_size(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mp4", quarters(), "libx264", aspect=Fraction(4))
    with pytest.raises(Fault, match="384 x 64"):
        look_at(path, 64 * 384 - 1)
    assert look_at(path, 64 * 384).original_size == (64, 384)


SD, HD = (576, 720), (720, 1280)
COLOUR = (200, 60, 30)
BT709, UNTAGGED, BT601, SMPTE240M, BT2020, BT2020C, YCGCO = 1, 2, 6, 7, 9, 10, 8


@pytest.mark.holds(
    "docs/model.md#how-frames-look",
    "in the colours that its stream says",
    "more than 576 rows or at least 1,280 columns",
)
@pytest.mark.parametrize(
    ("tag", "size", "matrix"),
    [
        (UNTAGGED, HD, "BT.709"),
        (UNTAGGED, (600, 640), "BT.709"),
        (UNTAGGED, (64, 1280), "BT.709"),
        (UNTAGGED, SD, "BT.601"),
        (BT709, SD, "BT.709"),
        (BT601, HD, "BT.601"),
        (SMPTE240M, SD, "240M"),
        (BT2020, HD, "BT.2020"),
        (BT2020C, SD, "BT.2020"),
        (YCGCO, HD, "BT.709"),
    ],
)
@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv422p10le", "yuv444p12le"])
@pytest.mark.parametrize("is_full", [False, True])
def test_colours_are_those_that_were_drawn(
    tmp_path: Path, tag: int, size: tuple[int, int], matrix: str, pixel_format: str, is_full: bool
) -> None:
    frames = one_colour([value / 255 for value in COLOUR], matrix, pixel_format, size, is_full)
    tags = {"colorspace": tag, "color_range": 2 if is_full else 1}
    seen = look_at(write_clip(tmp_path / "clip.mkv", frames, "ffv1", **tags))
    assert colour_at(seen.frames[-1], (0.5, 0.5)) == pytest.approx(COLOUR, abs=3)


@pytest.mark.holds("docs/model.md#how-frames-look", "SDR of a wide gamut stays")
def test_wide_gamut_without_hdr_stays(tmp_path: Path) -> None:
    frames = one_colour([value / 255 for value in COLOUR], "BT.2020", "yuv420p10le", CLIP_SIZE)
    tags = {"colorspace": 9, "color_primaries": 9, "color_trc": 14}
    seen = look_at(write_clip(tmp_path / "clip.mkv", frames, "ffv1", **tags))
    assert colour_at(seen.frames[0], (0.5, 0.5)) == pytest.approx(COLOUR, abs=3)


@pytest.mark.parametrize(
    ("name", "codec"), [("clip.mp4", "libx264"), ("clip.webm", "libvpx-vp9"), ("clip.ts", "libx264")]
)
@pytest.mark.parametrize(("tag", "matrix"), [(UNTAGGED, "BT.709"), (BT601, "BT.601"), (BT709, "BT.709")])
def test_colours_of_hd_survive_the_usual_codecs(tmp_path: Path, name: str, codec: str, tag: int, matrix: str) -> None:
    frames = one_colour([value / 255 for value in COLOUR], matrix, "yuv420p", HD)
    seen = look_at(write_clip(tmp_path / name, frames, codec, options=LOSSLESS[codec], colorspace=tag))
    assert colour_at(seen.frames[-1], (0.5, 0.5)) == pytest.approx(COLOUR, abs=3)


@pytest.mark.parametrize(
    ("name", "codec", "pixel_format"), [("clip.mkv", "ffv1", "gbrp10le"), ("clip.mov", "png", "rgb24")]
)
def test_colours_without_a_matrix_stay(tmp_path: Path, name: str, codec: str, pixel_format: str) -> None:
    frames = [frame.reformat(format=pixel_format) for frame in quarters(2, "rgb24")]
    seen = look_at(write_clip(tmp_path / name, frames, codec))
    assert read_quarters(seen.frames[0]) == ["red", "green", "blue", "yellow"]
    assert colour_at(seen.frames[0], (0.25, 0.25)) == pytest.approx((255, 0, 0), abs=1)


@pytest.mark.parametrize(("is_full", "tag"), [(False, 1), (True, 2), (True, 0)])
@pytest.mark.parametrize("pixel_format", ["gray", "gray10le"])
@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_grey_clips_are_as_bright_as_they_say(
    tmp_path: Path, pixel_format: str, is_full: bool, tag: int, level: float
) -> None:
    frames = one_colour([level] * 3, "BT.709", pixel_format, CLIP_SIZE, is_full)
    seen = look_at(write_clip(tmp_path / "clip.mkv", frames, "ffv1", color_range=tag))
    assert colour_at(seen.frames[0], (0.5, 0.5)) == pytest.approx([255 * level] * 3, abs=2)
