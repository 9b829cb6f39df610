"""The frames read are the frames on screen at those times, on every kind of clip; what is damaged is salvaged."""

import io
from contextlib import closing
from functools import partial
from pathlib import Path
from socket import socket

import av
import numpy as np
import pytest
from PIL import Image

from keye.config.codes import ErrorCode
from keye.config.faults import Fault
from keye.config.job import VideoPart
from keye.worker.media.decode.channel import Channel
from keye.worker.media.decode.child import new_pixels
from keye.worker.media.decoded import DecodedVideo
from keye.worker.media.frames.clip import examine_clip
from keye.worker.media.frames.frame_reader import FrameReader
from keye.worker.media.frames.video import decode_video
from keye.worker.media.frames.video_plan import FitVideo
from keye.worker.sizing import VideoFit
from tests.support.zoo import (
    CLIP_SIZE,
    CLIPS,
    NUM_FRAMES,
    Zoo,
    draw_frame,
    draw_quarters,
    encode_clip,
    number_shown_at,
    read_number,
    read_quarters,
    shown_by_plain_decoding,
    steady_times,
    upright_numbers,
)

# Decoding large frames takes its time: of these, one way to read them stands for all.
SMALL = [name for name in CLIPS if "4k" not in name]


def all_at(size: tuple[int, int]) -> FitVideo:
    """A model that takes every frame, at this size."""
    return lambda _part, num_frames, _height, _width: VideoFit(num_frames, size, size)


def decode(path: Path, size: tuple[int, int] = CLIP_SIZE, **asked: object) -> DecodedVideo:
    part = VideoPart.model_validate({"uri": str(path), **asked})
    with path.open("rb") as file:
        return decode_video(file, part, all_at(size), 10**8)


def num_right(decoded: DecodedVideo) -> int:
    """How many frames of a steady clip are what their timestamps say."""
    return sum(
        read_number(frame) == round(30 * time)
        for frame, time in zip(decoded.frames, decoded.timestamps_seconds, strict=True)
    )


@pytest.mark.parametrize("name", SMALL)
def test_few_frames_far_apart_are_the_ones_on_screen(zoo: Zoo, name: str) -> None:
    """So few that seeking pays; 64 of them are read through a decoder child, see `test_zoo`."""
    shown = shown_by_plain_decoding(zoo[name], name)
    size = CLIP_SIZE[::-1] if "turned" in name else CLIP_SIZE
    decoded = decode(zoo[name], size, fps=60, max_frames=5)
    numbers = upright_numbers(decoded.frames, name)
    times = np.linspace(0, max(shown.values()), min(5, len(shown)))
    assert numbers == [number_shown_at(time, shown) for time in times]
    assert decoded.timestamps_seconds == pytest.approx([shown[number] for number in numbers], abs=1e-6)
    assert decoded.frames_corrupt == 0


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("num_frames", [6, 64])
def test_frames_at_random_times_are_the_ones_on_screen(zoo: Zoo, name: str, num_frames: int) -> None:
    with zoo[name].open("rb") as file:
        clip = examine_clip(file, 10**8)
        assert len(clip.index.pts) == len(CLIPS[name].seconds) - CLIPS[name].cut_at
        for seed in (1, 2) if name in SMALL else (1,):
            chosen = sorted(np.random.default_rng(seed).integers(0, len(clip.index.pts), num_frames).tolist())
            wanted = clip.index.pts[chosen].tolist()
            with closing(FrameReader(file, clip, wanted, 10**8)) as reader:
                frames = [reader.read(pts).frame.reformat(CLIP_SIZE[1], CLIP_SIZE[0], "rgb24") for pts in wanted]
            numbers = [read_number(frame.to_ndarray()) for frame in frames]
            assert numbers == [CLIPS[name].cut_at + number for number in chosen]


@pytest.mark.parametrize("name", SMALL)
def test_keyframes_are_read_where_asked_for_and_tell_their_own_times(zoo: Zoo, name: str) -> None:
    shown = shown_by_plain_decoding(zoo[name], name)
    size = CLIP_SIZE[::-1] if "turned" in name else CLIP_SIZE
    decoded = decode(zoo[name], size, sampling="keyframes", fps=60)
    numbers = upright_numbers(decoded.frames, name)
    assert decoded.timestamps_seconds == pytest.approx([shown[number] for number in numbers], abs=1e-6)
    assert decoded.frames_corrupt == 0
    if name in ("h264.mp4", "hevc_open_gop.mp4", "vp9.webm"):
        assert len(numbers) == len(set(numbers)) == 10


@pytest.mark.holds("docs/model.md#frames", "from the start of the clip")
def test_stretch_of_a_clip_is_read_with_times_of_the_whole_clip(zoo: Zoo) -> None:
    decoded = decode(zoo["h264.mp4"], fps=5, start_seconds=4, end_seconds=6)
    assert [read_number(frame) for frame in decoded.frames] == [120, 126, 133, 139, 146, 152, 159, 165, 172, 179]
    assert decoded.timestamps_seconds[0] == pytest.approx(4.0)
    assert (decoded.plan.fps, decoded.duration_seconds) == (5.0, pytest.approx(8.0))


def test_what_an_edit_list_hides_is_never_shown(zoo: Zoo) -> None:
    decoded = decode(zoo["h264_cut.mp4"], fps=30)
    assert [read_number(frame) for frame in decoded.frames] == list(range(40, NUM_FRAMES))
    assert decoded.timestamps_seconds[0] == 0


@pytest.mark.parametrize("rotation", [0, 90, 180, -90])
def test_turned_clip_comes_out_upright_and_is_fitted_by_its_upright_size(tmp_path: Path, rotation: int) -> None:
    path = encode_clip(tmp_path / "turned.mp4", steady_times(4), rotation=rotation)
    asked = []

    def fit(part: VideoPart, num_frames: int, height: int, width: int) -> VideoFit:
        asked.append((num_frames, height, width))
        half = (height // 2, width // 2)
        return VideoFit(num_frames, half, half)

    with path.open("rb") as file:
        decoded = decode_video(file, VideoPart(uri=str(path)), fit, 10**6)
    upright = np.rot90(draw_frame(3), rotation // 90)
    assert asked == [(4, *upright.shape[:2])]
    assert decoded.original_size == upright.shape[:2]
    half = upright[::2, ::2]
    assert decoded.frames.shape[1:] == half.shape
    assert abs(decoded.frames[3].astype(int) - half).mean() < 12
    assert decoded.frames.flags.c_contiguous


def test_colours_survive(tmp_path: Path) -> None:
    with av.open(tmp_path / "colours.mp4", "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(draw_quarters())))
        container.mux(stream.encode(None))
    decoded = decode(tmp_path / "colours.mp4", (64, 96))
    assert read_quarters(decoded.frames[0]) == ["red", "green", "blue", "yellow"]


def test_animated_gif_sent_as_a_video_is_read_as_one(tmp_path: Path) -> None:
    frames = [Image.fromarray(draw_frame(number)) for number in range(8)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:], duration=250)
    decoded = decode(tmp_path / "moving.gif", fps=4)
    assert [read_number(frame) for frame in decoded.frames] == list(range(8))


def test_cut_off_clip_gives_what_is_left_of_it(zoo: Zoo, tmp_path: Path) -> None:
    for name in ("h264_fragmented.mp4", "h264.ts", "vp9.webm", "h264_one_keyframe.mkv"):
        content = zoo[name].read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) * 6 // 10])
        decoded = decode(tmp_path / name, fps=30)
        assert 3 < decoded.duration_seconds < 7
        assert num_right(decoded) >= len(decoded.frames) - 4, name


def test_overwritten_clip_is_salvaged_and_the_damage_counted(zoo: Zoo, tmp_path: Path) -> None:
    content = bytearray(zoo["h264.mp4"].read_bytes())
    half = len(content) // 2
    content[half : half + 600] = bytes(600)
    (tmp_path / "damaged.mp4").write_bytes(content)
    decoded = decode(tmp_path / "damaged.mp4", fps=30)
    assert decoded.frames_corrupt > 0
    assert num_right(decoded) > NUM_FRAMES // 2


def test_clip_cut_off_before_its_index_is_corrupt(zoo: Zoo, tmp_path: Path) -> None:
    (tmp_path / "cut.mp4").write_bytes(zoo["h264.mp4"].read_bytes()[:5000])
    with pytest.raises(Fault) as caught:
        decode(tmp_path / "cut.mp4")
    assert caught.value.code is ErrorCode.MEDIA_CORRUPT


def test_clip_without_a_frame_says_so(tmp_path: Path) -> None:
    path = encode_clip(tmp_path / "none.mp4", [], container_options={"movflags": "empty_moov+frag_keyframe"})
    with pytest.raises(Fault, match="holds no frame") as caught:
        decode(path)
    assert caught.value.code is ErrorCode.MEDIA_CORRUPT


@pytest.mark.parametrize(
    ("content", "looks_like"),
    [
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "playlist"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "playlist"),
        (b'<?xml version="1.0"?><MPD><BaseURL>http://127.0.0.1/</BaseURL></MPD>', "playlist"),
        (b"%PDF-1.7", "PDF"),
        (b"\x89PNG\r\n\x1a\n", "PNG"),
        (b"\0\1\2\3" * 300, "unknown"),
    ],
)
def test_what_is_no_video_is_refused_whatever_its_name(tmp_path: Path, content: bytes, looks_like: str) -> None:
    (tmp_path / "clip.mp4").write_bytes(content)
    with pytest.raises(Fault, match=looks_like) as caught:
        decode(tmp_path / "clip.mp4")
    assert caught.value.code is ErrorCode.MEDIA_UNSUPPORTED


def test_file_with_sound_only_says_that_it_has_no_video(tmp_path: Path) -> None:
    with av.open(tmp_path / "sound.mp4", "w") as container:
        stream = container.add_stream("aac", rate=16000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 16000
        container.mux(stream.encode(silence))
        container.mux(stream.encode(None))
    with pytest.raises(Fault, match="no video stream") as caught:
        decode(tmp_path / "sound.mp4")
    assert caught.value.code is ErrorCode.MEDIA_UNSUPPORTED


def test_frames_larger_than_the_limit_are_refused_by_the_header(tmp_path: Path) -> None:
    path = encode_clip(tmp_path / "clip.mp4", steady_times(2))
    with path.open("rb") as file, pytest.raises(Fault, match="megapixels") as caught:
        decode_video(file, VideoPart(uri=str(path)), all_at(CLIP_SIZE), 96 * 160 - 1)
    assert caught.value.code is ErrorCode.MEDIA_TOO_LARGE


def test_more_pixels_than_a_job_may_hold_are_refused_before_they_are_made(tmp_path: Path) -> None:
    path = encode_clip(tmp_path / "clip.mp4", steady_times(30))
    asked = VideoPart(uri=str(path), fps=30)
    with socket() as end, path.open("rb") as file:
        allocate = partial(new_pixels, Channel(end), 300 * 2**20)
        with pytest.raises(Fault, match="max_frames") as caught:
            decode_video(file, asked, all_at((2000, 2000)), 10**6, new_pixels=allocate)
    assert caught.value.code is ErrorCode.MEDIA_TOO_LARGE


def test_random_damage_ends_in_frames_or_a_fault_and_nothing_else(zoo: Zoo) -> None:
    rng = np.random.default_rng(0)
    for name in ("h264.mp4", "h264.ts", "hevc_open_gop.mp4", "vp9.webm", "av1.mp4", "mpeg4.avi"):
        whole = zoo[name].read_bytes()
        for _ in range(8):
            content = bytearray(whole)
            for position in rng.integers(0, len(content), 40):
                content[position] = rng.integers(256)
            part = VideoPart(uri="/clip", max_frames=16)
            try:
                decoded = decode_video(io.BytesIO(content), part, all_at(CLIP_SIZE), 10**6)
            except Fault:
                continue
            assert decoded.frames.shape[1:] == (*CLIP_SIZE, 3)
