"""A job from keyword fields: plain strings as media, and every fault at once."""

from pathlib import Path

import pytest

from keye.config.faults import InvalidJob
from keye.config.formats import media_type_of
from keye.config.job import ImagePart, VideoPart
from keye.producer.client import Client, build_job


@pytest.mark.holds("docs/producers.md#what-a-medium-may-be", "Of a reference, the suffix tells an image from a video.")
@pytest.mark.parametrize(
    ("uri", "media_type"),
    [
        ("/data/cat.JPG", "image"),
        ("s3://bucket/a.b/clip.mp4?versionId=7", "video"),
        ("https://cdn.example/x.webm?signature=a.png", "video"),
        ("data:image/png;base64,AAAA", "image"),
        ("/data/notes.txt", None),
        ("/data.mp4/clip", None),
        ("s3://bucket/clip", None),
    ],
)
def test_the_suffix_alone_tells_image_from_video(uri: str, media_type: str | None) -> None:
    assert media_type_of(uri) == media_type


def test_strings_paths_and_parts_keep_their_order() -> None:
    job = build_job({"prompt": "?", "media": [Path("/b.mp4"), ImagePart(uri="/c", max_pixels=10_000), "/a.png"]})
    assert job.media == (VideoPart(uri="/b.mp4"), ImagePart(uri="/c", max_pixels=10_000), ImagePart(uri="/a.png"))


def test_a_reference_that_does_not_tell_its_type_is_refused_with_its_place() -> None:
    with pytest.raises(InvalidJob, match=r"media\.1: .* ImagePart or a VideoPart"):
        build_job({"prompt": "?", "media": ["/a.png", "/clip"]})


@pytest.mark.holds("docs/design.md#one-job-walked", "submit: validate (every fault at once)")
def test_every_fault_of_a_job_is_reported_at_once() -> None:
    with pytest.raises(InvalidJob) as refused:
        build_job({"promt": "?", "media": ["ftp://a.png"], "generation": {"temperature": 3}, "priority": "urgent"})
    message = str(refused.value)
    assert message.startswith("4 faults: ")
    assert all(field in message for field in ("promt", "media.0.image.uri", "generation.temperature", "priority"))


@pytest.mark.parametrize(
    "given", ["4bf92f3577b34da6a3ce929d0e0e4736", f"00-{'4B' * 16}-{'0f' * 8}-01", "00-a-b-01\n", ""]
)
def test_what_names_no_trace_is_refused_with_the_form_of_one(given: str) -> None:
    with pytest.raises(InvalidJob, match="1 fault: traceparent: is no traceparent: that is 00-<32 hex digits>"):
        build_job({"prompt": "?", "traceparent": given})


def test_a_job_and_loose_fields_together_are_refused() -> None:
    with pytest.raises(TypeError, match="thinking"):
        Client().submit(build_job({"prompt": "?"}), thinking="think")
