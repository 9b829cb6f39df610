"""The front door: media of one job in order, the one to blame named, nothing left open, no secret told."""

import base64
import gc
import io
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from threading import Barrier, Event, Thread
from typing import Any

import pytest
from PIL import Image

from keye.config.codes import ErrorCode
from keye.config.faults import Fault
from keye.config.job import ImagePart, VideoPart
from keye.config.settings import Settings
from keye.worker.media.faults import name_medium
from keye.worker.media.job_media import (
    DecodedImage,
    DecodedVideo,
    DecoderPool,
    MediaCache,
    MediaLimits,
    decode,
    fetch,
)
from keye.worker.sizing import Sizing
from tests.support.conditions import eventually
from tests.support.zoo import draw_quarters, encode_clip, read_number, read_quarters, steady_times


@pytest.fixture
def limits(tmp_path: Path) -> MediaLimits:
    return MediaLimits.of(
        Settings(media_roots=(tmp_path,), max_image_bytes=2**20, max_image_pixels=10**6, max_video_bytes=2**20)
    )


# Shows all media of these tests as they are.
SIZING = Sizing(factor=2, min_pixels=4, max_pixels=10**6)

Prepare = Callable[[list[ImagePart | VideoPart], MediaLimits, Path], list[DecodedImage | DecodedVideo]]


@pytest.fixture
def prepare(decoders: DecoderPool) -> Prepare:
    return lambda parts, limits, folder: decode(
        parts, fetch(parts, limits, MediaCache(folder / "cache", max_bytes=0)), limits, SIZING, decoders
    )


def as_data_uri(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def quarters() -> Image.Image:
    return Image.fromarray(draw_quarters())


def test_media_come_back_decoded_in_the_order_of_the_job(limits: MediaLimits, tmp_path: Path, prepare: Prepare) -> None:
    clip = encode_clip(tmp_path / "clip.mp4", steady_times(60))
    quarters().save(tmp_path / "photo.jpg")
    parts: list[ImagePart | VideoPart] = [
        VideoPart(uri=str(clip)),
        ImagePart(uri=f"file://{tmp_path}/photo.jpg"),
        ImagePart(uri=as_data_uri(quarters())),
    ]
    video, photo, inline = prepare(parts, limits, tmp_path)
    assert isinstance(video, DecodedVideo)
    assert [read_number(frame) for frame in video.frames] == [0, 19, 39, 59]
    for image in (photo, inline):
        assert isinstance(image, DecodedImage)
        assert read_quarters(image.pixels) == ["red", "green", "blue", "yellow"]


def test_fault_names_the_medium_to_blame_at_either_stage(limits: MediaLimits, tmp_path: Path, prepare: Prepare) -> None:
    good = ImagePart(uri=as_data_uri(quarters()))
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(Fault) as missing:
        prepare([good, good, ImagePart(uri=f"{tmp_path}/absent.png")], limits, tmp_path)
    assert (missing.value.code, missing.value.media_index) == (ErrorCode.MEDIA_NOT_FOUND, 2)
    with pytest.raises(Fault) as unreadable:
        prepare([good, ImagePart(uri=f"{tmp_path}/text.png"), good], limits, tmp_path)
    assert (unreadable.value.code, unreadable.value.media_index) == (ErrorCode.MEDIA_UNSUPPORTED, 1)


def test_the_end_of_the_job_while_frames_are_decoded_is_no_mediums_fault(
    limits: MediaLimits, tmp_path: Path, decoders: DecoderPool
) -> None:
    def end(_media_index: int, _done: int, _total: int) -> None:
        raise Fault(ErrorCode.CANCELLED, "The caller cancelled the job while it ran.")

    parts = [VideoPart(uri=str(encode_clip(tmp_path / "clip.mp4", steady_times(30))))]
    fetched = fetch(parts, limits, MediaCache(tmp_path / "cache", max_bytes=0))
    with pytest.raises(Fault, match="cancelled") as caught:
        decode(parts, fetched, limits, SIZING, decoders, end)
    assert (caught.value.code, caught.value.media_index) == (ErrorCode.CANCELLED, None)


def test_no_file_stays_open_however_it_ends(limits: MediaLimits, tmp_path: Path, prepare: Prepare) -> None:
    quarters().save(tmp_path / "photo.jpg")
    (tmp_path / "text.png").write_text("no picture")
    clip = encode_clip(tmp_path / "clip.mp4", steady_times(30))
    good: list[ImagePart | VideoPart] = [ImagePart(uri=f"{tmp_path}/photo.jpg"), VideoPart(uri=str(clip))]
    gc.collect()  # files of tests that ran before
    open_before = len(os.listdir("/proc/self/fd"))
    prepare(good, limits, tmp_path)
    for bad in ("absent.png", "text.png"):
        with pytest.raises(Fault):
            prepare([*good, ImagePart(uri=f"{tmp_path}/{bad}")], limits, tmp_path)
    # A medium that is still being opened when another one fails is closed soon after.
    while len(os.listdir("/proc/self/fd")) > open_before:
        time.sleep(0.01)


def test_all_media_of_a_job_share_one_limit_on_pixels(limits: MediaLimits, tmp_path: Path, prepare: Prepare) -> None:
    Image.new("RGB", (1000, 1000)).save(tmp_path / "photo.png")
    part = ImagePart(uri=f"{tmp_path}/photo.png")
    tight = replace(limits, max_decoded_bytes=7_000_000)
    assert len(prepare([part, part], tight, tmp_path)) == 2
    with pytest.raises(Fault, match="fewer or smaller") as caught:
        prepare([part, part, part], tight, tmp_path)
    assert caught.value.code is ErrorCode.MEDIA_TOO_LARGE


@pytest.mark.holds(
    "docs/operations.md#which-media-does-a-worker-read",
    "then decoded side by side in as many children as there are",
)
def test_images_of_a_job_are_decoded_side_by_side(limits: MediaLimits, tmp_path: Path) -> None:
    both = Barrier(2)

    class Meeting(DecoderPool):
        def _allocate(self, *asked: Any) -> Any:
            both.wait(timeout=20)
            return super()._allocate(*asked)

    parts = [ImagePart(uri=as_data_uri(quarters().resize(size))) for size in ((48, 32), (96, 64))]
    fetched = fetch(parts, limits, MediaCache(tmp_path / "cache", max_bytes=0))
    with Meeting(2, 60, max_decoded_bytes=limits.max_decoded_bytes) as pool:
        first, second = decode(parts, fetched, limits, SIZING, pool)
    assert (first.original_size, second.original_size) == ((32, 48), (64, 96))


def test_a_job_is_told_whether_its_media_wait_for_a_decoder_or_are_in_one(limits: MediaLimits, tmp_path: Path) -> None:
    told: list[str] = []
    other_waits = Event()

    class Slow(DecoderPool):
        def _allocate(self, *asked: Any) -> Any:
            assert other_waits.wait(20)
            return super()._allocate(*asked)

    def read(whose: str) -> None:
        parts = [ImagePart(uri=as_data_uri(quarters()))]
        fetched = fetch(parts, limits, MediaCache(tmp_path / "cache", max_bytes=0))
        decode(parts, fetched, limits, SIZING, pool, on_wait=tell("wait", whose), on_begin=tell("begin", whose))

    def tell(what: str, whose: str) -> Callable[..., None]:
        def note(*_: Any) -> None:
            told.append(f"{what} {whose}")
            if told[-1] == "wait other":
                other_waits.set()

        return note

    with Slow(1, 60, max_decoded_bytes=limits.max_decoded_bytes) as pool:
        first = Thread(target=read, args=["first"])
        first.start()
        eventually(lambda: "begin first" in told)
        read("other")
        first.join()
    assert told == [*(["wait first"] if told[0] == "wait first" else []), "begin first", "wait other", "begin other"]


def test_first_fault_ends_the_media_that_wait_for_room_and_keeps_no_pixels(limits: MediaLimits, tmp_path: Path) -> None:
    def read(*parts: ImagePart) -> list[DecodedImage | DecodedVideo]:
        return decode(parts, fetch(parts, limits, MediaCache(tmp_path / "cache", max_bytes=0)), limits, SIZING, pool)

    def fail() -> None:
        with pytest.raises(Fault) as caught:
            read(small, large, ImagePart(uri="data:,text"))
        # The fault is still held, and no search for cycles helps.
        outcome.put((caught.value, len(pixels_held())))

    small, large = (ImagePart(uri=as_data_uri(quarters().resize((side, side)))) for side in (10, 100))
    outcome: SimpleQueue[tuple[Fault, int]] = SimpleQueue()
    gc.collect()
    gc.disable()
    try:
        with DecoderPool(2, 60, max_decoded_bytes=3 * 100 * 100 + 1000) as pool:
            others = pixels_held()
            held = read(large)
            job = Thread(target=fail, daemon=True)
            job.start()
            job.join(20)
            fault, num_held = outcome.get(timeout=0)
    finally:
        gc.enable()
    assert (fault.code, fault.media_index) == (ErrorCode.MEDIA_UNSUPPORTED, 2)
    assert num_held == len(others) + len(held)


def pixels_held() -> list[str]:
    """The memory for pixels that this process has mapped."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if "keye-pixels" in line]


@pytest.mark.holds("docs/operations.md#which-media-does-a-worker-read", "`data:` URIs of up to 1 MiB.")
@pytest.mark.parametrize(
    ("uri", "code"),
    [
        ("https://example.com/photo.jpg", ErrorCode.MEDIA_FORBIDDEN),
        ("data:image/png;base64", ErrorCode.MEDIA_CORRUPT),
        ("data:image/png;base64,no!base64", ErrorCode.MEDIA_CORRUPT),
        ("data:image/png;base64,", ErrorCode.MEDIA_CORRUPT),
        ("data:," + "A" * (2**20 + 1), ErrorCode.MEDIA_TOO_LARGE),
    ],
)
def test_reference_that_cannot_be_read_has_its_code(
    limits: MediaLimits, tmp_path: Path, prepare: Prepare, uri: str, code: ErrorCode
) -> None:
    with pytest.raises(Fault) as caught:
        prepare([ImagePart(uri=uri)], limits, tmp_path)
    assert caught.value.code is code
    assert len(caught.value.message) < 300
    assert caught.value.message.startswith(f"{name_medium(uri)}: ")


def test_sentence_begins_with_the_name_of_its_medium_once_wherever_it_is_raised(
    limits: MediaLimits, tmp_path: Path, prepare: Prepare
) -> None:
    text, clip = tmp_path / "text.mp4", encode_clip(tmp_path / "clip.mp4", steady_times(30, 30))
    text.write_text("no clip")
    wide = ImagePart(uri=as_data_uri(quarters().resize((402, 2))))
    told: list[tuple[ImagePart | VideoPart, str]] = [
        (VideoPart(uri=f"{tmp_path}/absent.mp4"), f"{tmp_path}/absent.mp4: there is no such file on this worker."),
        (VideoPart(uri="https://a/b.mp4"), "https://a/b.mp4: https: is off on this worker (KEYE_ALLOW_HTTPS). "),
        (VideoPart(uri=str(text)), f"{text}: is no video that is decoded here; it looks like text. Send MP4 or WebM."),
        (VideoPart(uri=str(clip), start_seconds=9), f"{clip}: start_seconds is 9, but the clip ends at 1.000 s."),
        (wide, "inline image/png: has 402 x 2 pixels, an aspect ratio of 201; the limit is 200. Crop it."),
    ]
    for part, sentence in told:
        with pytest.raises(Fault) as caught:
            prepare([part], limits, tmp_path)
        assert caught.value.message.startswith(sentence)


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("s3://bucket/a/key.mp4?versionId=3", "s3://bucket/a/key.mp4"),
        ("s3://bucket/key.mp4?X-Amz-Signature=abc", "s3://bucket/key.mp4"),
        ("https://user:word@host/a.jpg?token=abc#frag", "https://host/a.jpg"),
        ("HTTPS://host/a.jpg?token=abc", "https://host/a.jpg"),
        ("data:image/png;base64,AAAA", "inline image/png"),
        ("data:,AAAA", "inline data"),
        ("/media/a.jpg", "/media/a.jpg"),
    ],
)
def test_names_in_messages_hold_no_secret(uri: str, name: str) -> None:
    assert name_medium(uri) == name


def test_names_in_messages_are_short() -> None:
    assert len(name_medium("s3://bucket/" + "a" * 5000 + "/end.mp4")) < 200
