"""Thumbnails of media as people have them, and of media that are made to hurt whoever decodes them."""

import base64
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
import pytest
from PIL import Image
from pillow_heif import register_heif_opener

from keye.producer.batch.report import thumbnail_child, thumbnails
from keye.producer.batch.report.thumbnails import MAX_BYTES, SIDE, Thumbnail, Thumbnails
from tests.support.image_bombs import jpeg_of_gigapixels, jpeg_of_scans, webp_of_268_megapixels
from tests.support.video_bombs import elsewhere, garbage, large_frames, motion_jpeg_of_4_gigapixels
from tests.support.zoo import encode_clip, steady_times

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

Make = Callable[..., list[Thumbnail]]

WHITE, RED = (255, 255, 255), (254, 0, 0)


@pytest.fixture
def make() -> Iterator[Make]:
    with closing(Thumbnails(None)) as made:
        yield lambda *media: made.of(map(str, media))


def look(thumbnail: Thumbnail) -> Image.Image:
    assert thumbnail.why == ""
    assert len(thumbnail.jpeg) <= MAX_BYTES
    picture = Image.open(BytesIO(thumbnail.jpeg))
    assert (picture.format, picture.mode, max(picture.size) <= SIDE) == ("JPEG", "RGB", True)
    return picture


def colour(picture: Image.Image) -> tuple[int, ...]:
    found = picture.getpixel((picture.width // 2, picture.height // 2))
    assert isinstance(found, tuple)
    return tuple(map(int, found))


def test_a_picture_is_shown_as_people_see_it(make: Make, tmp_path: Path) -> None:
    turned = Image.new("RGB", (400, 100), "red")
    turned.getexif()[0x112] = 6
    turned.save(tmp_path / "turned.jpg", exif=turned.getexif(), comment=b"where I live")
    Image.new("RGBA", (300, 200), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("CMYK", (300, 200), (0, 255, 255, 0)).save(tmp_path / "print.jpg")
    Image.new("I;16", (300, 200), 0x8000).save(tmp_path / "deep.png")
    frames = [Image.new("RGB", (60, 60), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    Image.effect_noise((1500, 1000), 200).save(tmp_path / "noise.png")
    names = ("turned.jpg", "clear.png", "print.jpg", "deep.png", "moving.gif", "noise.png")
    upright, clear, printed, deep, moving, noise = map(look, make(*(tmp_path / name for name in names)))
    assert (upright.size, colour(upright)) == ((40, 160), RED)
    assert "where I live" not in str(upright.info)
    assert colour(clear) == WHITE
    assert colour(printed)[0] > 200 > 60 > colour(printed)[2]
    assert 120 < colour(deep)[0] < 136
    assert (moving.size, colour(moving)) == ((60, 60), RED)
    assert noise.size == (160, 107)


@pytest.mark.parametrize("kind", ["BMP", "WEBP", "TIFF", "AVIF", "JPEG", "MPO", "HEIF"])
def test_each_format_of_pictures_is_shown(make: Make, tmp_path: Path, kind: str) -> None:
    register_heif_opener()
    Image.new("RGB", (300, 200), "red").save(tmp_path / "picture", kind)
    (shown,) = make(tmp_path / "picture")
    assert colour(look(shown))[0] > 240 > 20 > colour(look(shown))[1]


@pytest.mark.parametrize(
    ("suffix", "codec"), [("mp4", "libx264"), ("webm", "libvpx-vp9"), ("h264", "libx264"), ("ts", "mpeg2video")]
)
def test_a_video_is_shown_by_a_frame_of_it(make: Make, tmp_path: Path, suffix: str, codec: str) -> None:
    clip = encode_clip(tmp_path / f"clip.{suffix}", steady_times(20), codec)
    (shown,) = make(clip)
    assert look(shown).size == (160, 96)


def test_a_video_stands_as_it_was_taken(make: Make, tmp_path: Path) -> None:
    (shown,) = make(encode_clip(tmp_path / "clip.mp4", steady_times(20), rotation=90))
    assert look(shown).size == (96, 160)


def test_what_is_inside_a_line_or_named_by_a_uri_is_shown(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a b.png"
    Image.new("RGB", (30, 20), "red").save(path)
    monkeypatch.chdir(tmp_path)
    inline = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    shown = make(inline, f"file://{tmp_path}/a%20b.png", "a b.png")
    assert [look(each).size for each in shown] == [(30, 20)] * 3
    assert shown[0].name == "inline image/png"


def test_what_cannot_be_shown_says_why(make: Make, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "page.jpg").write_text("<html><script>alert(1)</script>")
    cut = BytesIO()
    Image.effect_noise((300, 200), 80).save(cut, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(cut.getvalue()[:2000])
    with (tmp_path / "huge.jpg").open("wb") as file:
        file.write(cut.getvalue()[:2000])
        file.truncate(2**40)
    bombs = {
        "pixels.jpg": jpeg_of_gigapixels(),
        "scans.jpg": jpeg_of_scans(60),
        "large.webp": webp_of_268_megapixels(),
    }
    bombs |= {"garbage.mp4": garbage(tmp_path), "elsewhere.mp4": elsewhere(tmp_path)}
    bombs |= {"frames.mkv": large_frames(tmp_path), "motion.avi": motion_jpeg_of_4_gigapixels(tmp_path)}
    for name, content in bombs.items():
        (tmp_path / name).write_bytes(content)
    told = {
        "pipe.jpg": "it is a pipe or a device",
        "page.jpg": "it looks like an HTML page",
        "cut.jpg": "it is damaged or cut off",
        "gone.jpg": "No such file or directory",
        "pixels.jpg": "it is too large",
    }
    shown = {
        Path(each.name).name: each for each in make(*(tmp_path / name for name in {**told, **bombs, "huge.jpg": b""}))
    }
    assert {name: shown[name].why for name in told} == told
    assert not [each for each in shown.values() if bool(each.jpeg) == bool(each.why)]
    others = make("/dev/zero", "https://who:pw@host/a.jpg?signature=s", "data:image/png;base64,AA", "\0", tmp_path)
    assert [each.why != "" for each in others] == [True] * 5
    assert others[1] == ("https://host/a.jpg", b"", "what is on the web is not fetched")


def test_time_is_limited_for_one_and_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow.jpg").write_bytes(jpeg_of_scans(1000))
    monkeypatch.setattr(thumbnails, "MEDIUM_SECONDS", 0.0)
    with closing(Thumbnails(None)) as made:
        (shown,) = made.of([str(tmp_path / "slow.jpg")])
    assert shown.why == "it takes longer than 0 s to decode"
    monkeypatch.setattr(thumbnails, "ALL_SECONDS", 0.0)
    with closing(Thumbnails(None)) as made:
        (shown,) = made.of([str(tmp_path / "slow.jpg")])
    assert shown.why == "there was no time left for it"


@pytest.mark.holds(
    "docs/batches.md#how-do-i-look-at-it",
    "each in a process that can open nothing",
)
def test_the_process_that_decodes_opens_and_writes_nothing(tmp_path: Path) -> None:
    code = f"""
import runpy, socket
child = runpy.run_path({thumbnail_child.__file__!r})
child["confine"]()
child["open_no_more"]()
for attempt in (lambda: open("/etc/passwd"), socket.socket, lambda: open({str(tmp_path / "new")!r}, "w")):
    try:
        attempt()
        print("opened")
    except OSError:
        print("refused")
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.split() == ["refused"] * 3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.holds(
    "docs/batches.md#how-do-i-look-at-it",
    "and without them the page says so",
)
@pytest.mark.parametrize(
    ("module", "medium", "extra"),
    [("PIL", "a.png", "upload"), ("av", "a.mp4", "worker"), ("pillow_heif", "a.heic", "heic")],
)
def test_without_a_package_it_says_which_extra_gives_thumbnails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, medium: str, extra: str
) -> None:
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic")
    encode_clip(tmp_path / "a.mp4", steady_times(5))
    # What Python makes of it is that there is no such package.
    monkeypatch.setitem(sys.modules, module, None)
    with closing(Thumbnails(None)) as made:
        (shown,) = made.of([str(tmp_path / medium)])
    assert shown.why.endswith(" is not installed here")
    assert [lack.endswith(f"pip install 'keye-worker[{extra}]'") for lack in made.lacks] == [True]


@pytest.fixture
def store(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> "S3Client":
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "DEFAULT_REGION"):
        monkeypatch.setenv(f"AWS_{name}", "us-east-1")
    client = boto3.session.Session().client("s3", endpoint_url=s3_endpoint)
    client.create_bucket(Bucket="media")
    return client


def test_objects_of_a_bucket_are_shown_within_bounds(
    store: "S3Client", s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thumbnails, "MAX_OBJECT_BYTES", 20_000)
    Image.new("RGB", (30, 20), "red").save(tmp_path / "a.png")
    Image.effect_noise((300, 200), 80).save(tmp_path / "large.png")
    clip = encode_clip(tmp_path / "clip.ts", steady_times(60), "mpeg2video", grain=60)
    assert clip.stat().st_size > 20_000
    for path in tmp_path.iterdir():
        store.upload_file(str(path), "media", f"a folder/{path.name}")
    keys = ("a.png", "clip.ts", "large.png", "gone.png")
    with closing(Thumbnails(s3_endpoint)) as made:
        small, video, large, gone = made.of(f"s3://media/a folder/{key}" for key in keys)
    assert look(small).size == (30, 20)
    assert look(video).size == (160, 96)
    assert large.why == "it is damaged or cut off, or has more than 20,000 bytes"
    assert gone.why == "the store says NoSuchKey"
