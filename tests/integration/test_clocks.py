"""When each frame of a video is shown, whatever its container says of times, or does not say."""

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import av
import numpy as np
import pytest

from keye.config.codes import ErrorCode
from keye.config.faults import Fault
from keye.config.job import VideoPart
from keye.config.settings import Settings, VideoDecoder
from keye.worker.daemon.planning import CheckpointFacts, plan_media
from keye.worker.media.decoded import DecodedVideo
from keye.worker.media.frames.clip import examine_clip
from keye.worker.media.frames.frame_reader import FrameReader
from keye.worker.media.frames.video import decode_video
from keye.worker.media.job_media import DecoderPool, MediaCache, MediaLimits, decode, fetch
from keye.worker.sizing import Sizing, VideoFit
from tests.support.zoo import CLIP_SIZE, Zoo, encode_clip, read_number
from tests.support.zoo_of_clocks import CLOCKS, HALF, JOINED, NTSC, WHOLE, boxes, encode, in_fragments, make_clock

FACTS = CheckpointFacts(Sizing(factor=28, min_pixels=28 * 28, max_pixels=28 * 28 * 40), context=10**6, cache_bytes=1)

MakeClock = Callable[[str], Path]


@pytest.fixture(scope="module")
def clock(tmp_path_factory: pytest.TempPathFactory) -> MakeClock:
    """One of `CLOCKS` by name, made when it is first asked for."""
    folder, made = tmp_path_factory.mktemp("clocks"), dict[str, Path]()

    def make(name: str) -> Path:
        if name not in made:
            made[name] = make_clock(folder, name)
        return made[name]

    return make


def decode_here(path: Path, decoder: VideoDecoder = "pyav", **asked: object) -> DecodedVideo:
    part = VideoPart.model_validate({"uri": str(path), **asked})

    def take_all(_part: VideoPart, num_frames: int, _height: int, _width: int) -> VideoFit:
        return VideoFit(num_frames, CLIP_SIZE, CLIP_SIZE)

    with path.open("rb") as file:
        return decode_video(file, part, take_all, 10**8, decoder=decoder)


def numbers_in(decoded: DecodedVideo) -> list[int]:
    return [read_number(frame) for frame in decoded.frames]


@pytest.mark.holds(
    "docs/operations.md#which-media-does-a-worker-read", "Such a stream has as many frames a second as it tells, or 25"
)
@pytest.mark.parametrize("name", CLOCKS)
def test_each_frame_is_read_once_in_order_at_its_time(
    clock: MakeClock, decoders: DecoderPool, tmp_path: Path, name: str
) -> None:
    kind = CLOCKS[name]
    path, rate = clock(name), float(kind.rate)
    expected = range(kind.first, WHOLE)
    limits = MediaLimits.of(Settings(media_roots=(path.parent,)))
    sizing = Sizing(factor=2, min_pixels=1, max_pixels=CLIP_SIZE[0] * CLIP_SIZE[1])
    part = VideoPart(uri=str(path), fps=rate, resized_height=CLIP_SIZE[0], resized_width=CLIP_SIZE[1])
    (decoded,) = decode([part], fetch([part], limits, MediaCache(tmp_path, max_bytes=0)), limits, sizing, decoders)
    assert isinstance(decoded, DecodedVideo)
    assert numbers_in(decoded) == list(expected)
    # Some containers round to milliseconds, once for each part.
    times = [(number - kind.first) / rate for number in expected]
    assert decoded.timestamps_seconds == pytest.approx(times, abs=0.0021)
    assert decoded.duration_seconds == pytest.approx(len(expected) / rate, abs=0.0041)
    assert decoded.frames_corrupt == 0
    assert decoded.plan.frames_there == decoded.plan.frames_asked == len(expected)


@pytest.mark.parametrize("name", CLOCKS)
def test_few_frames_far_apart_and_those_of_a_stretch_are_the_ones_on_screen(clock: MakeClock, name: str) -> None:
    kind, path = CLOCKS[name], clock(name)
    step = 1 / float(kind.rate)
    decoded = decode_here(path, fps=60, max_frames=4)
    last = WHOLE - 1 - kind.first
    assert [n - kind.first for n in numbers_in(decoded)] == [last * place // 3 for place in range(4)]
    # A stretch from one frame's beginning to another's, seconds worked out and not rounded as containers do.
    start, end = HALF - 2, HALF + 11
    decoded = decode_here(path, fps=60, start_seconds=start * step, end_seconds=end * step)
    assert [n - kind.first for n in numbers_in(decoded)] == list(range(start, end))


@pytest.mark.parametrize("name", JOINED)
def test_a_joined_clip_says_where(clock: MakeClock, name: str) -> None:
    kind = JOINED[name]
    told = " ".join(decode_here(clock(name), max_frames=4).warnings)
    seconds = [float(number) for number in re.findall(r"(\d+\.\d+) s", told)]
    # In the file pictures come a little before or after those that are shown beside them.
    assert seconds == pytest.approx([frame / kind.rate for frame in kind.joined_at], abs=0.11)


def test_many_joins_are_told_in_one_short_sentence(clock: MakeClock, tmp_path: Path) -> None:
    path = tmp_path / "often.ts"
    path.write_bytes(clock("joined.ts").read_bytes() * 20)
    decoded = decode_here(path, fps=1)
    assert decoded.warnings == (
        "The clock of the file jumps at 2.000 s, 4.000 s, 6.000 s and 36 more, as where recordings were joined. "
        "Times go on without a gap.",
    )
    assert decoded.duration_seconds == pytest.approx(20 * WHOLE / 30)


@pytest.mark.parametrize("name", ["joined.ts", "joined.mkv", "mpeg4_b_frames.avi", "h264_b_frames.avi", "ntsc.mkv"])
def test_keyframes_are_those_of_all_parts(clock: MakeClock, name: str) -> None:
    with av.open(clock(name)) as container:
        decoded = [
            (frame.key_frame, frame.reformat(format="rgb24").to_ndarray()) for frame in container.decode(video=0)
        ]
    keyframes = {read_number(picture) for is_keyframe, picture in decoded if is_keyframe}
    numbers = numbers_in(decode_here(clock(name), fps=60, sampling="keyframes"))
    assert len(numbers) == len(keyframes)
    assert {0, max(keyframes)} <= set(numbers) <= keyframes


@pytest.mark.parametrize("decoder", ["torchcodec", "decord"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_other_decoders_step_aside_where_they_would_be_wrong(clock: MakeClock, decoder: VideoDecoder) -> None:
    if importlib.util.find_spec(decoder) is None:
        pytest.skip(f"{decoder} is not installed: pip install {decoder}")
    for name, kind in CLOCKS.items():
        decoded = decode_here(clock(name), decoder, fps=float(kind.rate))
        assert (name, numbers_in(decoded)) == (name, list(range(kind.first, WHOLE)))


def test_index_tells_how_many_bytes_each_frame_has_in_the_order_they_are_shown(zoo: Zoo) -> None:
    with av.open(zoo["h264.mp4"]) as container:
        sizes = {packet.pts: packet.size for packet in container.demux(video=0) if packet.size}
    with zoo["h264.mp4"].open("rb") as file:
        index = examine_clip(file, 10**8).index
    assert dict(zip(index.pts.tolist(), index.sizes.tolist(), strict=True)) == sizes
    assert np.all(np.diff(index.pts) > 0)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm"])
def test_a_slide_that_stands_for_minutes_is_no_jump(tmp_path: Path, suffix: str) -> None:
    codec = "libvpx-vp9" if suffix == ".webm" else "libx264"
    path = encode_clip(tmp_path / f"slides{suffix}", [0, 1, 121, 301, 302], codec)
    decoded = decode_here(path, fps=60, start_seconds=100, end_seconds=350, max_frames=3)
    assert numbers_in(decoded) == [1, 2, 4]
    assert decoded.duration_seconds > 302
    assert decoded.warnings == ()


def test_frames_of_the_same_time_are_two_frames(tmp_path: Path) -> None:
    path = tmp_path / "doubled.mkv"
    with av.open(encode(tmp_path / "once.avi", range(40), "mpeg4")) as once, av.open(path, "w") as doubled:
        copy = doubled.add_stream_from_template(once.streams.video[0])
        for packet in once.demux(video=0):
            if packet.size:
                packet.pts = packet.dts = packet.pts // 2 * 2
                packet.stream = copy
                doubled.mux(packet)
    with path.open("rb") as file:
        clip = examine_clip(file, 10**6)
        times = clip.index.pts.tolist()
        with closing(FrameReader(file, clip, times, 10**6)) as reader:
            pictures = [reader.read(pts).frame.to_ndarray(format="rgb24") for pts in times]
    assert [read_number(picture) for picture in pictures] == list(range(40))


@pytest.mark.holds(
    "docs/operations.md#which-media-does-a-worker-read",
    "Where the clock of a file restarts or jumps",
    "begins with the first",
)
@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="Debian's ffmpeg packs so, PyAV's does not")
@pytest.mark.parametrize("codec", ["mpeg4", "mpeg2video"])
def test_packs_that_tell_few_times_or_those_of_others_have_all_frames_in_order(tmp_path: Path, codec: str) -> None:
    whole, path = encode(tmp_path / "whole.mkv", range(WHOLE), rate=NTSC), tmp_path / "packs.vob"
    coding = [*f"-c:v {codec} -bf 2 -g 12 -q:v 3".split(), str(path)]
    subprocess.run(["ffmpeg", "-v", "error", "-i", str(whole), *coding], check=True)
    decoded = decode_here(path, fps=60)
    numbers = numbers_in(decoded)
    assert numbers == sorted(numbers)
    assert decoded.plan.frames_there == WHOLE
    assert len(set(numbers)) >= 0.95 * WHOLE
    assert decoded.timestamps_seconds == pytest.approx([number / NTSC for number in numbers], abs=0.1)


def test_plan_tells_what_decoding_finds(clock: MakeClock) -> None:
    for name in ("joined_ahead.ts", "cut_within_a_group.ts"):
        part = VideoPart(uri=str(clock(name)), fps=30, max_pixels=28 * 28 * 40)
        (planned,) = plan_media([part], FACTS, 10**6, 0.0)
        decoded = decode_here(clock(name), fps=30)
        assert planned.frames == len(decoded.frames)
        assert planned.duration_seconds == decoded.duration_seconds == pytest.approx((WHOLE - CLOCKS[name].first) / 30)
        assert (planned.warning or "") == " ".join(decoded.warnings)


@pytest.mark.parametrize("box", [b"free", b"sidx"])
def test_a_recording_that_was_not_finished_is_called_that(tmp_path: Path, box: bytes) -> None:
    found = boxes(in_fragments(tmp_path))
    path = tmp_path / "recording.mp4"
    path.write_bytes((16).to_bytes(4) + box + bytes(8) + b"".join(part for part in found if part[4:8] == b"mdat"))
    with pytest.raises(
        Fault, match=r"the recording was not finished, or is cut off: .* Send it once it is whole\."
    ) as told:
        decode_here(path)
    assert told.value.code is ErrorCode.MEDIA_CORRUPT
