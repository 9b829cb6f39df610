"""Every row of the table of formats, by real files: producer and worker call it the same, and it is decoded."""

import base64
import importlib.util
import io
import os
from pathlib import Path

import pytest
from PIL import Image, features

from keye.config.faults import InvalidJob
from keye.config.formats import FORMATS, Format, format_of, format_of_file, media_type_of
from keye.config.job import ImagePart, VideoPart
from keye.producer.client import build_job
from keye.worker.daemon.planning import part_of
from keye.worker.media.decode.image import decode_image
from keye.worker.media.frames.video import decode_video
from tests.support.zoo import CLIP_SIZE, draw_quarters, encode_clip, read_number, read_quarters, steady_times

SUFFIXES = [pytest.param(row, suffix, id=suffix) for row in FORMATS for suffix in row.suffixes]
CODECS = {
    "AVI": "mpeg4",
    "MPEG-PS": "mpeg2video",
    "MXF": "mpeg2video",
    "MPEG video": "mpeg2video",
    "HEVC": "libx265",
    "AV1": "libsvtav1",
    "IVF": "libvpx-vp9",
    "Ogg": "libvpx",
    "WMV": "mpeg4",
    ".webm": "libvpx-vp9",
}
# What the muxer for it is called elsewhere.
WRITTEN_AS = {
    ".qt": ".mov",
    ".m2p": ".mpg",
    ".avc": ".h264",
    ".264": ".h264",
    ".h265": ".hevc",
    ".265": ".hevc",
    ".m1v": ".m2v",
    ".mpv": ".m2v",
}
BRANDS = ("heic", "heix", "heim", "heis", "hevc", "hevx", "mif1", "msf1")

HAS_HEIF = importlib.util.find_spec("pillow_heif") is not None
IS_MISSING = {"AVIF": not features.check("avif"), "HEIF": not HAS_HEIF}


def make_picture(name: str) -> bytes:
    if IS_MISSING.get(name):
        pytest.skip(f"{name} is not encoded here")
    file = io.BytesIO()
    Image.fromarray(draw_quarters()).save(file, name)
    return file.getvalue()


def make_file(folder: Path, row: Format, suffix: str) -> Path:
    path = folder / f"medium{suffix}"
    if row.media_type == "image":
        path.write_bytes(make_picture(row.name))
        return path
    options = {"mpegts_m2ts_mode": "1"} if suffix == ".m2ts" else {}
    codec = CODECS.get(suffix) or CODECS.get(row.name, "libx264")
    made = encode_clip(
        folder / f"medium{WRITTEN_AS.get(suffix, suffix)}", steady_times(30), codec, container_options=options
    )
    return made.rename(path)


def every_frame(
    _part: object, num_frames: int, _height: int, _width: int
) -> tuple[int, tuple[int, int], tuple[int, int]]:
    return num_frames, CLIP_SIZE, CLIP_SIZE


@pytest.mark.holds("docs/operations.md#which-media-does-a-worker-read", "Images may be JPEG", "Videos may be MP4")
@pytest.mark.parametrize(("row", "suffix"), SUFFIXES)
def test_each_suffix_is_told_and_read_alike_by_producer_and_worker(tmp_path: Path, row: Format, suffix: str) -> None:
    path = make_file(tmp_path, row, suffix)
    content = path.read_bytes()
    kind = {"image": ImagePart, "video": VideoPart}[row.media_type]
    # The producer: a store's reference, the file here, its bytes, whatever they are called.
    assert media_type_of(f"s3://bucket/medium{suffix.upper()}?versionId=7") == row.media_type
    assert media_type_of(str(path)) == row.media_type
    nameless = path.rename(tmp_path / "medium")
    (part,) = build_job({"prompt": "?", "media": [nameless]}).media
    assert type(part) is kind
    inline = f"data:application/octet-stream;base64,{base64.b64encode(content).decode()}"
    assert media_type_of(inline) == row.media_type
    (held,) = build_job({"prompt": "?", "media": content}).media
    assert (held.type, held.uri.partition(";")[0]) == (row.media_type, f"data:{row.mime}")
    # The worker.
    with nameless.open("rb") as file:
        assert format_of_file(file) is row is format_of(content)
        assert type(part_of(nameless)) is kind
        if row.media_type == "image":
            assert read_quarters(decode_image(file, 10**6).pixels) == ["red", "green", "blue", "yellow"]
        else:
            clip = decode_video(file, VideoPart(uri="file:"), every_frame, 10**6)
            assert [read_number(clip.frames[at]) for at in (0, -1)] == [0, 29]


@pytest.mark.parametrize("brand", BRANDS)
def test_photo_of_a_phone_is_one_whatever_its_brand(tmp_path: Path, brand: str) -> None:
    content = bytearray(make_picture("HEIF"))
    content[8:12] = brand.encode()
    assert build_job({"prompt": "?", "media": content}).media[0].uri.startswith("data:image/heic;")
    assert read_quarters(decode_image(io.BytesIO(content), 10**6).pixels)[0] == "red"


def test_container_s_own_brand_leaves_it_to_the_others_what_the_picture_is() -> None:
    content = bytearray(make_picture("AVIF"))
    content[8:12] = b"mif1"
    assert format_of(content).name == "AVIF"


def test_gif_is_an_image_and_a_video_where_one_is_asked_for() -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue", "green")]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=500)
    file.seek(0)
    assert media_type_of("s3://bucket/a.gif") == "image"
    clip = decode_video(file, VideoPart(uri="file:", fps=2), every_frame, 10**6)
    assert len(clip.frames) == 3


def test_bytes_are_believed_before_what_a_data_uri_says_of_itself() -> None:
    payload = base64.b64encode(make_picture("PNG")).decode()
    assert media_type_of(f"DATA:video/mp4;base64,{payload}") == "image"
    assert media_type_of("data:,GIF89a%00%00") == "image"
    assert media_type_of("data:video/x-own,unknown%00") == "video"
    assert media_type_of("data:VIDEO/mp4;base64,=") == "video"
    assert media_type_of("data:application/octet-stream;base64,AAAA") is None


@pytest.mark.parametrize(
    "content",
    [
        b"The metadata of this file, my udta, and a uuid.",
        b"metameta moovless",
        bytes.fromhex("0000010001002020000001002000a8100000160000002800"),  # an icon
        bytes.fromhex("000001ba44000400040100"),  # a pack of MPEG-PS
        bytes(2000),
        b"\0\0\0\x01\x06" * 300,
        b"\0\0\0\x01\x06\0\0\x01" * 250,
        bytes(range(256)) * 8,
    ],
)
def test_what_only_resembles_a_stream_is_none(content: bytes) -> None:
    assert format_of(content).demuxer in (None, "mpeg")


def test_typescript_is_no_video(tmp_path: Path) -> None:
    for suffix in (".ts", ".mts"):
        source = tmp_path / f"index{suffix}"
        source.write_text("export const answer = 42;")
        with pytest.raises(InvalidJob, match=r"media\.0: .* it looks like text"):
            build_job({"prompt": "?", "media": [source]})
        # One that only the worker can see may well be a recording.
        assert media_type_of(f"s3://bucket/index{suffix}") == media_type_of(f"/absent/index{suffix}") == "video"


@pytest.mark.holds("docs/producers.md#what-a-medium-may-be", "Where it is none of these, the first bytes tell")
@pytest.mark.parametrize("way", ["{}", "file://{}"])
def test_file_here_is_looked_at_only_where_its_suffix_does_not_tell(tmp_path: Path, way: str) -> None:
    (tmp_path / "a photo").write_bytes(make_picture("JPEG"))
    (tmp_path / "photo.mp4").write_bytes(make_picture("JPEG"))
    (tmp_path / "notes").write_text("to do")
    os.mkfifo(tmp_path / "pipe")
    found = {
        name: media_type_of(way.format(tmp_path / name)) for name in ("a photo", "photo.mp4", "notes", "pipe", "absent")
    }
    assert found == {"a photo": "image", "photo.mp4": "video", "notes": None, "pipe": None, "absent": None}


@pytest.mark.holds("docs/producers.md#what-a-medium-may-be", "Images are `.jpg`")
def test_docs_name_every_suffix() -> None:
    told = (Path(__file__).parents[2] / "docs" / "producers.md").read_text()
    assert [suffix for row in FORMATS for suffix in row.suffixes if f"`{suffix}`" not in told] == []
