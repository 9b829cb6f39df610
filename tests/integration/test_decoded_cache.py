"""The second question about a medium: it decodes nothing, and is answered as if it had."""

import base64
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from keye.config.codes import ErrorCode
from keye.config.faults import Fault
from keye.config.job import Content, ImagePart, Sampling, VideoPart
from keye.config.settings import DecoderIsolation, Settings
from keye.worker.media.decode import pool as pool_module
from keye.worker.media.decoded import Decoded, DecodedVideo
from keye.worker.media.fetch import fetched
from keye.worker.media.fetch.fetched import Identity
from keye.worker.media.job_media import MediaCache, MediaLimits, decode, fetch
from keye.worker.sizing import Sizing
from keye.worker.tasks.visual_inputs import visual_inputs
from tests.support import decoder_bench
from tests.support.conditions import eventually
from tests.support.decoder_bench import CLIP_BYTES, Pool
from tests.support.decoder_children import children_of
from tests.support.zoo import draw_quarters, encode_clip, read_number, steady_times

SIZING = Sizing(factor=2, min_pixels=4, max_pixels=96 * 160)
PHOTO_BYTES = 64 * 96 * 3

Meanwhile = Callable[..., Any]


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 frames in a second."""
    return encode_clip(tmp_path_factory.mktemp("encoded") / "clip.mp4", steady_times(30))


class Bench:
    """Jobs that ask a pool about files of a folder, and how often any was decoded for them."""

    def __init__(self, folder: Path, encoded: Path, **asked: Any) -> None:
        self.others = children_of(os.getpid())
        self.num_decoded = 0
        usual = {"num_decoders": 1, "silence_seconds": 30, "max_decoded_bytes": 2**24, "cache_bytes": 2**23}
        self.pool = Pool(**{**usual, **asked})
        self.pool.before_allocating = self.count
        self.limits = MediaLimits.of(Settings(media_roots=(folder,), max_decoded_bytes=2**24))
        self.cache = MediaCache(folder / "cache", max_bytes=0)
        self.folder = folder
        self.clip = self.add_clip("clip", encoded)

    def count(self) -> None:
        self.num_decoded += 1

    def add_clip(self, name: str, encoded: Path) -> VideoPart:
        return VideoPart(uri=str(shutil.copy(encoded, self.folder / f"{name}.mp4")), fps=30)

    def add_photo(self, name: str) -> ImagePart:
        Image.fromarray(draw_quarters()).save(self.folder / f"{name}.png")
        return ImagePart(uri=str(self.folder / f"{name}.png"))

    def ask(self, *parts: ImagePart | VideoPart, sizing: Sizing = SIZING, **told: Any) -> list[Decoded]:
        limits = told.pop("limits", self.limits)
        return decode(parts, fetch(parts, limits, self.cache), limits, sizing, self.pool, **told)

    def ask_clip(self, **told: Any) -> DecodedVideo:
        (video,) = self.ask(self.clip, **told)
        assert isinstance(video, DecodedVideo)
        return video

    @property
    def child(self) -> int:
        (pid,) = children_of(os.getpid()) - self.others
        return pid


@pytest.fixture(autouse=True)
def _files_have_rested(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can set when a file was changed last, but what time it is now."""
    monkeypatch.setattr(fetched, "time", SimpleNamespace(time=lambda: time.time() + 60))


@pytest.fixture
def bench(tmp_path: Path, encoded: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path, encoded)
    with bench.pool:
        yield bench


@pytest.mark.holds(
    "docs/operations.md#is-a-clip-decoded-again-for-each-question-about-it",
    "what was decoded stays in the worker's memory",
    "The answer's `media` are those of a fresh decoding",
)
def test_the_second_question_about_a_clip_decodes_nothing_and_is_answered_as_the_first(bench: Bench) -> None:
    parts, told = (bench.clip, bench.add_photo("photo")), SimpleQueue[tuple[int, int, int]]()
    first = bench.ask(*parts)
    os.kill(bench.child, signal.SIGSTOP)
    second = bench.ask(*parts, on_frame=lambda *progress: told.put(progress))
    assert bench.num_decoded == 2
    assert (told.get(timeout=0), told.empty()) == ((0, 30, 30), True)
    identities = [Identity(0), Identity(0)]
    *_, seen = visual_inputs(SIZING, parts, identities, first)
    images, videos, seen_again = visual_inputs(SIZING, parts, identities, second)
    assert seen_again == seen
    assert [read_number(frame) for frame in videos[0].frames] == list(range(30))
    assert np.array_equal(images[0].pixels, draw_quarters())
    for pixels in (images[0].pixels, videos[0].frames):
        with pytest.raises(ValueError, match="read-only"):
            pixels[:] = 0


@pytest.mark.holds(
    "docs/operations.md#is-a-clip-decoded-again-for-each-question-about-it",
    "So is one of which anything else is asked",
)
def test_what_is_asked_otherwise_or_shown_otherwise_is_decoded_anew(bench: Bench) -> None:
    clip, photo = bench.clip, bench.add_photo("photo")
    bench.ask(clip)
    asked = (
        {"fps": 15},
        {"start_seconds": 0.5},
        {"max_frames": 7},
        {"max_pixels": 4000},
        {"sampling": Sampling.KEYFRAMES},
    )
    for number, otherwise in enumerate(asked, start=2):
        bench.ask(clip.model_copy(update=otherwise))
        assert bench.num_decoded == number
    bench.ask(clip, photo)
    assert bench.num_decoded == 7
    # What another question leaves of the context is other, but not so that it would show.
    bench.ask(clip, photo, sizing=replace(SIZING, video_tokens=10**6, image_tokens=10**6))
    assert bench.num_decoded == 7
    narrow = replace(SIZING, video_tokens=30 * 2000, image_tokens=1000)
    smaller = bench.ask(clip, photo, sizing=narrow)
    assert bench.num_decoded == 9
    assert isinstance(smaller[0], DecodedVideo)
    assert smaller[0].plan.size < (96, 160)
    bench.ask(clip, photo, sizing=narrow)
    assert bench.num_decoded == 9


def test_a_selection_is_good_for_the_room_that_it_was_made_for(bench: Bench) -> None:
    clip = bench.clip.model_copy(update={"fps": None, "content": Content.AUTO})
    ample, tight = replace(SIZING, video_tokens=10**6), replace(SIZING, video_tokens=3 * 60)
    for number, sizing in enumerate((ample, tight, ample), start=1):
        for _ in range(2):
            bench.ask(clip, sizing=sizing)
        assert bench.num_decoded == number


@pytest.mark.parametrize("has_digest", [False, True])
def test_a_file_that_was_changed_is_decoded_anew(bench: Bench, has_digest: bool) -> None:
    bench.clip = bench.clip.model_copy(update={"digest": has_digest})
    path, before = Path(bench.clip.uri), os.stat(bench.clip.uri)
    bench.ask_clip()
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    bench.ask_clip()
    assert bench.num_decoded == 2
    shutil.copy2(path, path.with_suffix(".new")).rename(path)
    bench.ask_clip()
    assert bench.num_decoded == 3


@pytest.mark.holds(
    "docs/operations.md#is-a-clip-decoded-again-for-each-question-about-it",
    "One that was changed less",
)
def test_a_file_that_is_changed_while_it_is_decoded_or_was_just_before_is_not_kept(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def touch() -> None:
        bench.count()
        os.utime(bench.clip.uri)

    bench.pool.before_allocating = touch
    assert "written to while it was read" in bench.ask_clip().warnings[0]
    bench.pool.before_allocating = bench.count
    monkeypatch.setattr(fetched, "time", time)
    os.utime(bench.clip.uri)
    assert [bench.ask_clip().warnings for _ in range(2)] == [(), ()]
    assert bench.num_decoded == 3
    assert bench.pool.num_cached_bytes == 0


@pytest.mark.holds(
    "docs/operations.md#is-a-clip-decoded-again-for-each-question-about-it",
    "A medium is the same where its bytes are: by their SHA-256",
)
def test_what_has_a_digest_is_the_same_under_any_name(bench: Bench) -> None:
    written = base64.b64encode(Path(bench.add_photo("photo").uri).read_bytes()).decode()
    for head in ("data:image/png;base64,", "data:;base64,", "data:image/png;name=a;base64,"):
        bench.ask(ImagePart(uri=head + written))
    assert bench.num_decoded == 1


@pytest.mark.parametrize("cache_bytes", [3 * PHOTO_BYTES])
def test_the_least_recently_used_goes_first_and_no_more_is_kept_than_may_be(
    tmp_path: Path, encoded: Path, cache_bytes: int
) -> None:
    bench = Bench(tmp_path, encoded, cache_bytes=cache_bytes)
    photos = [bench.add_photo(name) for name in "abcd"]
    with bench.pool:
        for photo in photos[:3]:
            bench.ask(photo)
        bench.ask(photos[0])
        bench.ask(photos[3])
        assert (bench.num_decoded, bench.pool.num_cached_bytes) == (4, cache_bytes)
        bench.ask(photos[0])
        assert bench.num_decoded == 4
        bench.ask(photos[1])
        assert bench.num_decoded == 5
        bench.ask_clip()  # larger than all that may be kept: takes nobody's place
        assert bench.pool.num_cached_bytes == cache_bytes


@pytest.mark.holds(
    "docs/operations.md#is-a-clip-decoded-again-for-each-question-about-it",
    "It makes room as soon as a job needs some",
)
@pytest.mark.holds("docs/design.md#decisions", "what was decoded stays within it for the next question")
def test_what_is_kept_makes_room_for_a_job_at_once(tmp_path: Path, encoded: Path) -> None:
    bench = Bench(tmp_path, encoded, max_decoded_bytes=3 * CLIP_BYTES, cache_bytes=3 * CLIP_BYTES)
    waits: list[str] = []
    with bench.pool:
        parts = [bench.add_clip(name, encoded) for name in "abc"]
        for part in parts:
            bench.ask(part)
        held = bench.ask(parts[2], bench.clip, on_wait=waits.append)
        assert "memory" not in waits
        assert bench.pool.num_cached_bytes == 3 * CLIP_BYTES
        assert bench.num_decoded == 4
        bench.pool.keep(held[0].frames, CLIP_BYTES)  # as what is made of it is
        assert bench.pool.num_cached_bytes == 2 * CLIP_BYTES
        bench.ask(parts[2])
        assert bench.num_decoded == 4


@pytest.mark.holds(
    "docs/operations.md#is-a-clip-decoded-again-for-each-question-about-it",
    "Questions that come at once",
)
def test_ten_questions_at_once_have_their_clip_decoded_once(bench: Bench, meanwhile: Meanwhile) -> None:
    def hold_up() -> None:
        bench.count()
        assert go_on.wait(20)

    go_on, waits, told = Event(), SimpleQueue[str](), SimpleQueue[tuple[int, int, int]]()
    bench.pool.before_allocating = hold_up
    first = meanwhile(bench.ask_clip)
    eventually(lambda: bench.num_decoded)
    others = [meanwhile(bench.ask_clip, on_wait=waits.put, on_frame=lambda *each: told.put(each)) for _ in range(9)]
    eventually(lambda: waits.qsize() == 9)
    go_on.set()
    assert all(other.result(20).frames is first.result(20).frames for other in others)
    assert bench.num_decoded == 1
    assert {waits.get() for _ in others} == {"decoder"}
    assert [told.get() for _ in others] == 9 * [(0, 30, 30)]


def test_who_waits_for_anothers_decoding_ends_when_it_must_and_goes_on_when_that_one_ends(
    bench: Bench, meanwhile: Meanwhile
) -> None:
    def stop_child() -> None:
        bench.count()
        bench.pool.before_allocating = bench.count
        os.kill(bench.child, signal.SIGSTOP)

    def check(whose: str) -> Callable[[], None]:
        def raise_if_over() -> None:
            if whose in are_over:
                raise LookupError(whose)

        return raise_if_over

    are_over, waits = set[str](), SimpleQueue[str]()
    bench.pool.before_allocating = stop_child
    first = meanwhile(bench.ask_clip, check=check("first"))
    eventually(lambda: bench.num_decoded)
    others = [meanwhile(bench.ask_clip, on_wait=waits.put, check=check(f"other {number}")) for number in range(3)]
    eventually(lambda: waits.qsize() == 3)
    for whose, job in (("other 0", others[0]), ("first", first)):
        are_over.add(whose)
        with pytest.raises(LookupError, match=whose):
            job.result(20)
    assert others[1].result(20).frames is others[2].result(20).frames
    assert bench.num_decoded == 2


def test_a_failure_is_shared_with_nobody(bench: Bench, meanwhile: Meanwhile) -> None:
    bench.ask(bench.add_photo("photo"))
    child, begun, waits = bench.child, Event(), SimpleQueue[str]()
    os.kill(child, signal.SIGSTOP)
    tight = replace(bench.limits, max_decoded_bytes=CLIP_BYTES - 1)
    first = meanwhile(bench.ask_clip, limits=tight, on_begin=begun.set)
    assert begun.wait(20)
    other = meanwhile(bench.ask_clip, on_wait=waits.put)
    assert waits.get(timeout=20) == "decoder"
    os.kill(child, signal.SIGCONT)
    with pytest.raises(Fault) as caught:
        first.result(20)
    assert caught.value.code is ErrorCode.MEDIA_TOO_LARGE
    assert len(other.result(20).frames) == 30


def test_who_waits_for_anothers_decoding_does_not_hold_what_that_one_waits_for(
    tmp_path: Path, meanwhile: Meanwhile
) -> None:
    """There is room for one clip, which the elder job has when it asks for the one that the younger is to decode."""
    waits, others = SimpleQueue[str](), children_of(os.getpid())
    with Pool(1, silence_seconds=30, max_decoded_bytes=2 * CLIP_BYTES - 1, cache_bytes=CLIP_BYTES) as pool:
        plain = decoder_bench.Bench(pool, tmp_path, others)
        with pool.share() as elder:
            held = plain.decode_clip(share=elder, content=lambda: "first")
            younger = meanwhile(plain.decode_clip, content=lambda: "second", on_wait=waits.put)
            eventually(lambda: not waits.empty() and waits.get() == "memory")
            second = meanwhile(plain.decode_clip, share=elder, content=lambda: "second").result(20)
        assert second.frames is younger.result(20).frames
        assert held.frames is not second.frames


def test_pixels_from_before_count_towards_what_a_job_may_have(bench: Bench) -> None:
    tight = replace(bench.limits, max_decoded_bytes=2 * CLIP_BYTES)
    assert len(bench.ask(bench.clip, bench.clip, limits=tight)) == 2
    with pytest.raises(Fault, match=r"clip\.mp4: would take 1 MiB of pixels, of which this job has 0 left\.") as caught:
        bench.ask(bench.clip, bench.clip, bench.clip, limits=tight)
    assert caught.value.code is ErrorCode.MEDIA_TOO_LARGE
    assert bench.num_decoded == 1


def test_what_a_decoder_has_decoded_is_given_to_nobody_once_it_has_ended(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "MAX_MEDIA_A_CHILD", 2)
    photo = bench.add_photo("photo")
    for num_decoded in (1, 1):
        bench.ask_clip()
        assert bench.num_decoded == num_decoded
    bench.ask(photo)
    bench.ask_clip()
    assert bench.num_decoded == 3


@pytest.mark.holds(
    "docs/operations.md#is-a-clip-decoded-again-for-each-question-about-it",
    "Nothing is kept with",
)
@pytest.mark.parametrize(("isolation", "cache_bytes"), [("job", 2**23), ("worker", 0)])
def test_nothing_is_kept_where_jobs_are_apart_or_the_operator_says_so(
    tmp_path: Path, encoded: Path, isolation: DecoderIsolation, cache_bytes: int
) -> None:
    bench = Bench(tmp_path, encoded, isolation=isolation, cache_bytes=cache_bytes)
    with bench.pool:
        for _ in range(2):
            bench.ask_clip()
        assert (bench.num_decoded, bench.pool.num_cached_bytes) == (2, 0)


def test_half_of_the_memory_for_pixels_is_kept_where_nobody_says_otherwise() -> None:
    assert Settings(max_decoded_bytes=2**30).frames_cache_bytes == 2**29
    assert Settings(max_decoded_bytes=2**30, frames_cache_bytes=0).frames_cache_bytes == 0
