"""Media held in memory: what becomes of bytes and pictures when they travel inside a job, and what is refused."""

import base64
import io
import subprocess
import sys
from typing import Any

import pytest
from PIL import ExifTags, Image

from keye.config.faults import InvalidJob, UploadFailed
from keye.config.job import MAX_INLINE_BYTES, MAX_INLINE_URI_CHARS, ImagePart
from keye.config.settings import Settings
from keye.producer.client import Client, build_job
from keye.producer.upload import Media


def inline(medium: Any) -> tuple[str, str, bytes]:
    """(type, MIME type, bytes) of what the job holds."""
    (part,) = build_job({"prompt": "?", "media": [medium]}, Media(Settings())).media
    head, _, payload = part.uri.partition(";base64,")
    return part.type, head.removeprefix("data:"), base64.b64decode(payload)


def opened(medium: Any) -> Image.Image:
    return Image.open(io.BytesIO(inline(medium)[2]))


@pytest.mark.parametrize(
    ("content", "media_type", "mime"),
    [
        (b"\xff\xd8\xff\xe0 photo", "image", "image/jpeg"),
        (b"\x89PNG\r\n\x1a\n", "image", "image/png"),
        (bytearray(b"RIFF\0\0\0\0WEBPVP8 "), "image", "image/webp"),
        (memoryview(b"\0\0\0\x18ftypisom"), "video", "video/mp4"),
        (b"\0\0\0\x18ftypavif", "image", "image/avif"),
        (b"\x1aE\xdf\xa3", "video", "video/webm"),
    ],
)
def test_small_files_travel_inside_the_job_as_they_are(content: Any, media_type: str, mime: str) -> None:
    assert inline(content) == (media_type, mime, bytes(content))


@pytest.mark.holds("docs/producers.md#what-a-medium-may-be", "a picture pixel for pixel, upright")
def test_pictures_travel_pixel_for_pixel_and_upright() -> None:
    picture = Image.effect_mandelbrot((40, 30), (-2, -1, 1, 1), 50).convert("RGB")
    assert opened(picture).tobytes() == picture.tobytes()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    file = io.BytesIO()
    picture.save(file, "TIFF", exif=exif)
    assert opened(Image.open(file)).tobytes() == picture.transpose(Image.Transpose.ROTATE_270).tobytes()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16", "CMYK", "YCbCr", "HSV", "LAB", "F"])
def test_pictures_of_every_mode_travel(mode: str) -> None:
    assert opened(Image.new(mode, (30, 20))).size == (30, 20)


def test_parts_stay_as_they_are() -> None:
    for medium in (ImagePart(uri="/a"), {"type": "image", "uri": "/a"}, {"type": "odd"}):
        assert Media(Settings()).in_media([medium]) == [medium]


@pytest.mark.holds("docs/producers.md#what-a-medium-may-be", "Where that is not set, an `InvalidJob` says so")
def test_large_file_without_a_place_to_put_it_is_refused_with_what_to_do() -> None:
    content = b"\xff\xd8\xff" + bytes(MAX_INLINE_BYTES)
    with pytest.raises(InvalidJob, match=r"media\.1: has 1,048,579 bytes.*KEYE_UPLOAD_PREFIX.*give its URI"):
        Client(Settings(upload_prefix=None)).submit(prompt="?", media=["/a.png", content])


PHOTO = b"\xff\xd8\xff" + bytes(MAX_INLINE_BYTES - 3)
URI_CHARS = len(build_job({"prompt": "?", "media": PHOTO}).media[0].uri)


def test_many_pictures_travel_inside_as_long_as_the_job_has_room() -> None:
    num_inside = MAX_INLINE_URI_CHARS // URI_CHARS
    job = build_job({"prompt": "?", "media": [PHOTO] * num_inside})
    assert len(job.media) == num_inside == 8


def test_picture_that_fills_the_room_to_the_last_character_travels_inside() -> None:
    head = len("data:image/jpeg;base64,")
    room = MAX_INLINE_URI_CHARS - 8 * URI_CHARS - head
    last = b"\xff\xd8\xff" + bytes(room // 4 * 3 - 3)
    job = build_job({"prompt": "?", "media": [*[PHOTO] * 8, last]})
    assert MAX_INLINE_URI_CHARS - 4 < sum(len(part.uri) for part in job.media) <= MAX_INLINE_URI_CHARS
    with pytest.raises(InvalidJob, match=r"media\.8: "):
        build_job({"prompt": "?", "media": [*[PHOTO] * 8, last + b"x"]}, Media(Settings(upload_prefix=None)))


def test_picture_beyond_the_room_is_refused_with_the_bounds_and_what_to_do() -> None:
    told = r"media\.9: has 1,048,576 bytes, .* 1,048,576, of all media together 9,437,184, .*KEYE_UPLOAD_PREFIX"
    with pytest.raises(InvalidJob, match=told):
        Client(Settings(upload_prefix=None)).submit(prompt="?", media=["/a.png", *[PHOTO] * 9])


def test_bytes_of_nothing_known_are_refused() -> None:
    told = r"media\.0: is empty\.; media\.1: begins like no image or video that is known; it looks like text"
    with pytest.raises(InvalidJob, match=told):
        build_job({"prompt": "?", "media": [b"", b"hello"]}, Media(Settings()))


def test_without_boto3_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "botocore.exceptions", None)
    settings = Settings(upload_prefix="s3://uploads/here")
    with pytest.raises(UploadFailed, match=r"pip install 'keye-worker\[upload\]'"):
        build_job({"prompt": "?", "media": b"\xff\xd8\xff" + bytes(MAX_INLINE_BYTES)}, Media(settings))


def test_bytes_travel_without_pillow_and_boto3() -> None:
    code = (
        "import sys; from keye.producer.client import build_job;"
        r"build_job({'prompt': '?', 'media': b'\xff\xd8\xff'}); print({'PIL', 'boto3', 'numpy'} & set(sys.modules))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "set()"
