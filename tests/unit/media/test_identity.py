"""What tells a medium's bytes from any others is of the file that is decoded, whatever its name leads to by then."""

import base64
import hashlib
import os
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from keye.config.codes import ErrorCode
from keye.config.faults import Fault
from keye.config.job import ImagePart
from keye.config.settings import Settings
from keye.worker.media.fetch.fetched import as_told
from keye.worker.media.job_media import DecoderPool, MediaCache, MediaLimits, decode, fetch
from keye.worker.sizing import Sizing

SIZING = Sizing(factor=2, min_pixels=4, max_pixels=10**6)


@pytest.fixture
def limits(tmp_path: Path) -> MediaLimits:
    return MediaLimits.of(Settings(media_roots=(tmp_path,)))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.new("RGB", (60, 40), "red").save(path)
    return path


@pytest.fixture
def cache(tmp_path: Path) -> MediaCache:
    return MediaCache(tmp_path / "cache", 0)


def sha256_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.mark.holds("docs/operations.md#was-that-really-what-the-model-saw", "A local file is told by its size")
@pytest.mark.holds(
    "docs/operations.md#was-that-really-what-the-model-saw",
    "a part with `digest=True` has the worker read it once more",
)
def test_a_local_file_has_its_digest_where_it_is_asked_for(
    picture: Path, limits: MediaLimits, cache: MediaCache
) -> None:
    parts = [ImagePart(uri=str(picture), digest=digest) for digest in (True, False)]
    fetched = fetch(parts, limits, cache)
    for medium in fetched:
        medium.close()
    with_digest, without = [medium.identity for medium in fetched]
    found = picture.stat()
    assert with_digest.sha256 == sha256_of(picture.read_bytes())
    assert without == replace(with_digest, sha256=None)
    assert (without.num_bytes, without.modified_at, without.inode) == (found.st_size, found.st_mtime, found.st_ino)


def test_inline_bytes_have_theirs(picture: Path, limits: MediaLimits, cache: MediaCache) -> None:
    content = picture.read_bytes()
    uri = "data:image/png;base64," + base64.b64encode(content).decode()
    (medium,) = fetch([ImagePart(uri=uri)], limits, cache)
    assert (medium.identity.num_bytes, medium.identity.sha256) == (len(content), sha256_of(content))
    assert medium.identity.inode is None
    with medium as file:
        assert file.read() == content


def put_another_in_place(path: Path) -> None:
    other = path.with_name("other.png")
    Image.new("RGB", (40, 60), "blue").save(other)
    other.rename(path)


@pytest.mark.holds(
    "docs/operations.md#was-that-really-what-the-model-saw",
    "of the open file that decoders were handed, not of what its name leads to by then",
)
def test_the_digest_is_of_the_file_that_is_decoded_though_its_name_leads_to_another_by_then(
    picture: Path, limits: MediaLimits, cache: MediaCache, decoders: DecoderPool
) -> None:
    content = picture.read_bytes()
    part = ImagePart(uri=str(picture), digest=True)
    (medium,) = fetch([part], limits, cache)
    put_another_in_place(picture)
    (decoded,) = decode([part], [medium], limits, SIZING, decoders)
    assert (medium.identity.sha256, decoded.original_size) == (sha256_of(content), (40, 60))
    assert decoded.warnings == ()


def save_again(path: Path) -> None:
    """The same file by its inode, other pixels."""
    content = path.read_bytes()
    Image.new("RGB", (60, 40), "blue").save(path)
    assert path.read_bytes() != content
    os.utime(path, ns=(1, 1))


@pytest.mark.holds(
    "docs/operations.md#was-that-really-what-the-model-saw", "where its digest was asked for it is read anew"
)
def test_no_digest_is_told_of_a_file_that_was_written_to_before_it_was_decoded(
    picture: Path, limits: MediaLimits, cache: MediaCache, decoders: DecoderPool
) -> None:
    part = ImagePart(uri=str(picture), digest=True)
    (medium,) = fetch([part], limits, cache)
    save_again(picture)
    with pytest.raises(Fault, match="was written to while it was read") as fault:
        decode([part], [medium], limits, SIZING, decoders)
    assert (fault.value.code, fault.value.media_index) == (ErrorCode.MEDIA_UNREACHABLE, 0)


@pytest.mark.holds(
    "docs/operations.md#was-that-really-what-the-model-saw", "A file that is written to while it is read is warned of"
)
def test_without_a_digest_such_a_file_is_warned_of(
    picture: Path, limits: MediaLimits, cache: MediaCache, decoders: DecoderPool
) -> None:
    part = ImagePart(uri=str(picture))
    (medium,) = fetch([part], limits, cache)
    save_again(picture)
    (decoded,) = decode([part], [medium], limits, SIZING, decoders)
    assert decoded.warnings == ("It was written to while it was read: its size and time are those from before.",)


@pytest.mark.parametrize(
    ("told", "kept"), [('"abc"', '"abc"'), ("", None), (None, None), ("a" * 300, None), ("\x1b[2J", None), ("ä", None)]
)
def test_what_a_store_says_is_kept_where_it_is_short_and_plain(told: str | None, kept: str | None) -> None:
    assert as_told(told) == kept
