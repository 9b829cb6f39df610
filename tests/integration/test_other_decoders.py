"""torchcodec and decord, where chosen: the same frames as PyAV's, and PyAV itself where they would be wrong."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from keye.config.job import VideoPart
from keye.config.settings import Settings, VideoDecoder
from keye.worker.media.decoded import DecodedVideo
from keye.worker.media.frames.clip import examine_clip
from keye.worker.media.frames.video import OnFrame, decode_video
from keye.worker.media.job_media import DecoderPool, MediaCache, MediaLimits, decode, fetch
from keye.worker.sizing import Size, Sizing, VideoFit
from tests.support.zoo import (
    CLIP_SIZE,
    CLIPS,
    Zoo,
    encode_clip,
    number_shown_at,
    shown_by_plain_decoding,
    upright_numbers,
)
from tests.support.zoo_of_looks import ODD, PLAIN

SMALL = [name for name in CLIPS if "4k" not in name]


def decode_directly(
    path: Path, decoder: VideoDecoder, size: Size, on_frame: OnFrame = lambda done, total: None, **asked: object
) -> DecodedVideo:
    part = VideoPart.model_validate({"uri": str(path), **asked})

    def fit(_part: VideoPart, num_frames: int, _height: int, _width: int) -> VideoFit:
        return VideoFit(num_frames, size, size)

    with path.open("rb") as file:
        return decode_video(file, part, fit, 10**8, on_frame, decoder=decoder)


@pytest.fixture(params=["torchcodec", "decord"])
def decoder(request: pytest.FixtureRequest, tmp_path: Path) -> VideoDecoder:
    chosen: VideoDecoder = request.param
    if chosen == "pyav":
        return chosen
    if importlib.util.find_spec(chosen) is None:
        pytest.skip(f"{chosen} is not installed: pip install {chosen}")
    clip = encode_clip(tmp_path / "clip.mp4", [0.0, 0.1])
    if decode_directly(clip, chosen, CLIP_SIZE).decoder != chosen:
        pytest.skip(f"{chosen} does not decode here. torchcodec needs FFmpeg's shared libraries: apt install ffmpeg")
    return chosen


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_chosen_decoder_reads_no_wrong_frame(decoder: VideoDecoder, zoo: Zoo, name: str) -> None:
    shown = shown_by_plain_decoding(zoo[name], name)
    size = CLIP_SIZE[::-1] if "turned" in name else CLIP_SIZE
    for num_frames in (5, 64):
        decoded = decode_directly(zoo[name], decoder, size, fps=60, max_frames=num_frames)
        times = np.linspace(0, max(shown.values()), min(num_frames, len(shown)))
        assert upright_numbers(decoded.frames, name) == [number_shown_at(time, shown) for time in times]


@pytest.mark.parametrize("name", ["h264.ts", "h264_cut.mp4", "h264_open_gop.mp4", "hevc_open_gop.mp4", "av1.mp4"])
def test_decord_never_reads_what_it_reads_wrongly(zoo: Zoo, name: str) -> None:
    assert decode_directly(zoo[name], "decord", CLIP_SIZE, max_frames=4).decoder == "pyav"


def test_chosen_decoder_reads_an_ordinary_clip_itself(decoder: VideoDecoder, zoo: Zoo) -> None:
    decoded = decode_directly(zoo["h264.mp4"], decoder, CLIP_SIZE)
    assert decoded.decoder == decoder
    assert abs(decoded.frames.astype(int) - decode_directly(zoo["h264.mp4"], "pyav", CLIP_SIZE).frames).mean() < 2


@pytest.mark.holds("docs/model.md#how-frames-look", "torchcodec and decord are only given clips that need none of this")
@pytest.mark.parametrize("look", [*ODD, *PLAIN])
def test_chosen_decoder_shows_no_clip_otherwise_than_pyav(decoder: VideoDecoder, tmp_path: Path, look: str) -> None:
    path = (ODD | PLAIN)[look](tmp_path / "clip")
    with path.open("rb") as file:
        size = examine_clip(file, 10**8).upright_size
    decoded = decode_directly(path, decoder, size)
    assert decoded.decoder == (decoder if look in PLAIN else "pyav")
    assert abs(decoded.frames.astype(int) - decode_directly(path, "pyav", size).frames).mean() < 3


def test_chosen_decoder_works_within_the_bounds_of_a_decoder_child(decoder: VideoDecoder, zoo: Zoo) -> None:
    limits = MediaLimits.of(Settings(media_roots=(zoo["h264.mp4"].parent,)))
    part = VideoPart(uri=str(zoo["h264.mp4"]), fps=5)
    sizing = Sizing(factor=2, min_pixels=1, max_pixels=CLIP_SIZE[0] * CLIP_SIZE[1])
    fetched = fetch([part], limits, MediaCache(zoo["h264.mp4"].parent / "cache", max_bytes=0))
    with DecoderPool(1, 60, 2**30, video_decoder=decoder) as decoders:
        (decoded,) = decode([part], fetched, limits, sizing, decoders)
    assert isinstance(decoded, DecodedVideo)
    assert decoded.decoder == decoder
    assert len(set(upright_numbers(decoded.frames, "h264.mp4"))) == 40


@pytest.mark.holds(
    "docs/operations.md#what-can-a-broken-or-hostile-file-do", "All that a decoder imports it imports before"
)
@pytest.mark.parametrize("decoder", ["pyav", "torchcodec", "decord"], indirect=True)
def test_whole_zoo_is_read_in_a_decoder_child_as_it_is_outside(decoder: VideoDecoder, zoo: Zoo, tmp_path: Path) -> None:
    limits = MediaLimits.of(Settings(media_roots=(zoo["h264.mp4"].parent,)))
    sizing = Sizing(factor=2, min_pixels=1, max_pixels=CLIP_SIZE[0] * CLIP_SIZE[1])
    cache = MediaCache(tmp_path, max_bytes=0)
    with DecoderPool(1, 60, 2**30, video_decoder=decoder) as decoders:
        for name in SMALL:
            part = VideoPart(uri=str(zoo[name]), max_frames=4)
            (inside,) = decode([part], fetch([part], limits, cache), limits, sizing, decoders)
            with zoo[name].open("rb") as file:
                outside = decode_video(file, part, sizing.fit_video, 10**8, decoder=decoder)
            assert isinstance(inside, DecodedVideo)
            assert (name, inside.decoder, inside.timestamps_seconds) == (
                name,
                outside.decoder,
                outside.timestamps_seconds,
            )
            assert np.array_equal(inside.frames, outside.frames), name
        assert {process.num_decoded for process in decoders._idle} == {len(SMALL)}


def test_damaged_clip_is_salvaged_by_pyav_whatever_was_chosen(decoder: VideoDecoder, zoo: Zoo, tmp_path: Path) -> None:
    content = zoo["h264_fragmented.mp4"].read_bytes()
    (tmp_path / "cut.mp4").write_bytes(content[: len(content) // 2])
    decoded = decode_directly(tmp_path / "cut.mp4", decoder, CLIP_SIZE, fps=30)
    assert upright_numbers(decoded.frames, "h264_fragmented.mp4")[:90] == list(range(90))


def test_progress_never_goes_back_when_pyav_steps_in(decoder: VideoDecoder, zoo: Zoo, tmp_path: Path) -> None:
    content = bytearray(zoo["h264.mp4"].read_bytes())
    half = len(content) // 2
    content[half : half + 600] = bytes(600)
    (tmp_path / "damaged.mp4").write_bytes(content)
    told: list[int] = []
    decoded = decode_directly(tmp_path / "damaged.mp4", decoder, CLIP_SIZE, lambda done, _: told.append(done), fps=30)
    assert decoded.decoder == "pyav"
    assert told == sorted(told)
    assert told[-1] == len(decoded.frames)
