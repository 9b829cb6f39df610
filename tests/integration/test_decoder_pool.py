"""Decoder children: what a broken file, a broken child or a broken worker costs, and what children may not do."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from threading import Thread, Timer
from typing import Any

import numpy as np
import pytest
from PIL import Image

from keye.config.codes import ErrorCode
from keye.config.faults import Fault
from keye.worker.media.decode import pool
from keye.worker.media.decode.decoder import Decoder, DecodingOrder
from keye.worker.media.decoded import DecodedImage
from tests.support.conditions import eventually
from tests.support.decoder_bench import CLIP_BYTES, Bench, Pool, handles
from tests.support.decoder_children import children_of
from tests.support.zoo import encode_clip, read_number, read_quarters, steady_times


def kill(pid: int) -> None:
    """And wait until all its threads have ended; to take note of it is left to the pool."""
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


@pytest.fixture
def silence_seconds() -> float:
    """How long a child may take between two frames."""
    return 30


@pytest.fixture
def bench(tmp_path: Path, silence_seconds: float) -> Iterator[Bench]:
    others = children_of(os.getpid())
    with Pool(1, silence_seconds=silence_seconds, max_decoded_bytes=2 * CLIP_BYTES - 1) as pool:
        yield Bench(pool, tmp_path, others)


def test_a_child_cannot_invent_a_code_for_callers(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    invented = {"fault": "INVENTED", "sentence": "what a hostile file made a decoder say", "is_doubtful": False}
    monkeypatch.setattr(Decoder, "_next_message", lambda *_: invented)
    with pytest.raises(Fault, match="says what none should"):
        bench.decode_clip()


@pytest.mark.parametrize(
    "lie",
    [
        {"size": [48, 160]},
        {"wanted": list(range(15))},
        {"frames_asked": 3},
        {"frames_asked": -1, "frames_there": 0},
    ],
)
def test_a_child_cannot_invent_sizes_or_numbers_of_frames(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, lie: dict[str, Any]
) -> None:
    """What the model is shown, and the memory and tokens of it, is the rule's to say."""
    honest = Decoder._next_message

    def tampered(decoder: Decoder, order: DecodingOrder, give_up_at: float) -> dict[str, Any]:
        message = honest(decoder, order, give_up_at)
        if "video" in message:
            plan = message["video"]["plan"] | lie
            message["video"]["plan"] = plan
            message["shape"] = [len(plan["wanted"]), 30 * 96 // len(plan["wanted"]), 160, 3]
        return message

    monkeypatch.setattr(Decoder, "_next_message", tampered)
    with pytest.raises(Fault, match="says what none should"):
        bench.decode_clip()
    monkeypatch.undo()
    bench.assert_works()


def test_pixels_and_facts_are_those_of_the_file(bench: Bench) -> None:
    video, photo = bench.decode_clip(), bench.decode(bench.photo)
    assert [read_number(frame) for frame in video.frames] == list(range(30))
    assert video.timestamps_seconds == pytest.approx(steady_times(30), abs=1e-3)
    assert video.plan.fps == pytest.approx(30)
    assert (video.original_size, video.plan.size) == ((96, 160), (96, 160))
    assert video.frames.flags.c_contiguous
    assert isinstance(photo, DecodedImage)
    assert read_quarters(photo.pixels) == ["red", "green", "blue", "yellow"]
    assert photo.original_size == (64, 96)


@pytest.mark.holds(
    "docs/operations.md#what-can-a-broken-or-hostile-file-do",
    "One that crashes or says what none should (`MEDIA_CORRUPT`)",
)
@pytest.mark.holds("docs/operations.md#how-long-may-a-job-take", "`KEYE_DECODE_TIMEOUT_SECONDS` | `MEDIA_TOO_LARGE`")
@pytest.mark.parametrize(
    ("number", "silence_seconds", "code", "reason"),
    [
        (signal.SIGSEGV, 30, ErrorCode.MEDIA_CORRUPT, r"^clip\.mp4: its decoder crashed on it \(SIGSEGV\)"),
        (signal.SIGABRT, 30, ErrorCode.MEDIA_CORRUPT, "SIGABRT"),
        (signal.SIGKILL, 30, ErrorCode.MEDIA_TOO_LARGE, "for want of memory"),
        (signal.SIGXCPU, 30, ErrorCode.MEDIA_TOO_LARGE, "CPU time"),
        (signal.SIGSTOP, 4, ErrorCode.MEDIA_TOO_LARGE, "no progress for 4 s"),
    ],
)
def test_child_that_ends_or_hangs_each_time_costs_its_job_an_error_and_is_replaced(
    bench: Bench, number: signal.Signals, silence_seconds: float, code: ErrorCode, reason: str
) -> None:
    def strike() -> None:
        struck.append(bench.child)
        os.kill(bench.child, number)
        if number is signal.SIGSTOP:  # memory that is granted gives no more time
            time.sleep(silence_seconds / 2)

    struck: list[int] = []
    bench.assert_works()
    bench.pool.before_allocating = strike
    give_up_at = time.monotonic() + 1.4 * silence_seconds
    fault = bench.blame()
    bench.pool.before_allocating = lambda: None
    assert time.monotonic() < give_up_at
    assert fault.code is code
    assert re.search(reason, fault.message)
    bench.assert_works()
    assert bench.child != struck[0]


def test_the_pixels_of_a_child_that_died_are_not_held_against_the_second_try(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def strike(*asked: Any) -> Any:
        allocated = allocate(*asked)
        kill(bench.child)
        monkeypatch.undo()
        return allocated

    bench.assert_works()
    allocate = bench.pool._allocate
    monkeypatch.setattr(bench.pool, "_allocate", strike)
    assert len(bench.decode_clip(limits={"max_decoded_bytes": 3 * CLIP_BYTES // 2}).frames) == 30


@pytest.mark.parametrize("silence_seconds", [2])
def test_a_slow_start_of_a_child_is_no_time_of_its_medium(bench: Bench) -> None:
    (child,) = eventually(lambda: bench.children)
    os.kill(child, signal.SIGSTOP)
    Timer(3, os.kill, (child, signal.SIGCONT)).start()
    assert isinstance(bench.decode(bench.photo), DecodedImage)
    assert bench.child == child


def test_child_that_died_in_its_sleep_is_blamed_on_nobody(bench: Bench) -> None:
    bench.assert_works()
    kill(bench.child)
    bench.assert_works()


@pytest.mark.holds("docs/operations.md#what-can-a-broken-or-hostile-file-do", "A child serves one job after another")
def test_fault_of_a_file_or_of_its_size_leaves_the_child_at_work(bench: Bench, tmp_path: Path) -> None:
    bench.assert_works()
    child = bench.child
    (tmp_path / "broken.mp4").write_bytes(bench.clip.read_bytes()[:700])
    Image.new("RGB", (9000, 30)).save(tmp_path / "flat.png")
    encode_clip(tmp_path / "flat.mp4", steady_times(3), size=(8, 2000))
    for name, code, told in (
        ("broken.mp4", ErrorCode.MEDIA_CORRUPT, "broken"),
        (
            "flat.png",
            ErrorCode.MEDIA_UNSUPPORTED,
            r"flat\.png: has 9000 x 30 pixels, an aspect ratio of 300; the limit is 200\. Crop it\.$",
        ),
        ("flat.mp4", ErrorCode.MEDIA_UNSUPPORTED, r"flat\.mp4: has 2000 x 8 pixels, .* the limit is 200"),
    ):
        with pytest.raises(Fault, match=told) as caught:
            bench.decode(tmp_path / name)
        assert caught.value.code is code
    bench.assert_works()
    assert bench.child == child


@pytest.mark.holds("docs/operations.md#what-can-a-broken-or-hostile-file-do", "A cancelled job takes")
def test_job_that_is_over_takes_its_child_with_it_at_once(bench: Bench) -> None:
    stopped: list[int] = []

    def stop() -> None:
        stopped.append(bench.child)
        os.kill(bench.child, signal.SIGSTOP)
        bench.pool.before_allocating = lambda: None

    def cancel() -> None:
        if stopped:
            raise LookupError

    bench.pool.before_allocating = stop
    with pytest.raises(LookupError):
        bench.decode_clip(check=cancel)
    bench.assert_works()
    assert stopped[0] not in bench.children


def test_child_is_replaced_after_so_many_media(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "MAX_MEDIA_A_CHILD", 2)
    bench.assert_works()
    first = bench.child
    for _ in range(2):
        bench.assert_works()
    assert bench.child != first


def test_pixels_outlive_the_child_and_leave_nothing_behind(bench: Bench) -> None:
    bench.assert_works()
    shared_before, held_before = os.listdir("/dev/shm"), len(handles())
    video = bench.decode_clip()
    kill(bench.child)
    assert [read_number(frame) for frame in video.frames] == list(range(30))
    assert os.listdir("/dev/shm") == shared_before
    del video
    bench.assert_works()
    assert len(handles()) == held_before


def test_child_cannot_take_shared_pixels_away(bench: Bench) -> None:
    """A page that is gone ends who reads it with SIGBUS."""
    video = bench.decode_clip()
    (handle,) = (handle for handle, name in handles().items() if "keye-pixels" in name)
    with pytest.raises(PermissionError):
        os.ftruncate(int(handle), 0)
    assert video.frames.any()


@pytest.mark.holds("docs/operations.md#what-can-a-broken-or-hostile-file-do", "further jobs wait to decode")
def test_job_waits_until_there_is_room_for_its_pixels(bench: Bench) -> None:
    held = bench.decode_clip()
    outcome: SimpleQueue[np.ndarray] = SimpleQueue()
    looks: SimpleQueue[None] = SimpleQueue()
    with bench.pool.share() as elder:
        waiting = Thread(target=lambda: outcome.put(bench.decode_clip(check=lambda: looks.put(None)).frames))
        waiting.start()
        eventually(lambda: looks.qsize() > 10)
        assert outcome.empty()
        photo = bench.decode(bench.photo, share=elder)  # small enough, and the child is free for it
        assert isinstance(photo, DecodedImage)
    del held
    waiting.join(20)
    assert [read_number(frame) for frame in outcome.get(timeout=0)] == list(range(30))


@pytest.mark.holds(
    "docs/operations.md#what-can-a-broken-or-hostile-file-do", "the one that began first may pass the bound"
)
@pytest.mark.holds("docs/design.md#decisions", "which the eldest may pass by what one")
def test_eldest_job_gets_room_that_the_others_wait_for(bench: Bench) -> None:
    """Two jobs of two clips each, where there is room for one clip: who waits while holding must not wait for ever."""

    def decode_both() -> None:
        with bench.pool.share() as share:
            done.put(len([bench.decode_clip(share=share), bench.decode_clip(share=share)]))

    done: SimpleQueue[int] = SimpleQueue()
    jobs = [Thread(target=decode_both) for _ in range(3)]
    for job in jobs:
        job.start()
    eventually(lambda: done.qsize() == 3, within_seconds=60)


@pytest.mark.holds("docs/operations.md#what-can-a-broken-or-hostile-file-do", "says 2", "may write no file")
def test_child_holds_no_torch_no_secret_and_no_network(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.assert_works()
    process = Path(f"/proc/{bench.child}")
    assert "torch" not in (process / "maps").read_text()
    names = {line.partition("=")[0] for line in (process / "environ").read_text().split("\0")}
    assert names.isdisjoint({name for name in os.environ if name.startswith(("KEYE_", "AWS_", "REDIS"))})
    limits = (process / "limits").read_text()
    assert "Max file size             0" in limits
    assert "Max core file size        0" in limits
    assert "Seccomp:\t2" in (process / "status").read_text()


@pytest.mark.holds("docs/operations.md#what-can-a-broken-or-hostile-file-do", "none outlives its worker")
def test_children_die_with_their_worker() -> None:
    code = """
import time
from keye.worker.media.decode.pool import DecoderPool
DecoderPool(2, 60, 2**20).start()
time.sleep(60)
"""
    worker = subprocess.Popen([sys.executable, "-c", code])
    children = eventually(lambda: len(found := children_of(worker.pid)) == 2 and found)
    worker.kill()
    worker.wait()
    eventually(lambda: not any(Path(f"/proc/{child}/exe").exists() for child in children))


@pytest.mark.holds("docs/operations.md#which-media-does-a-worker-read", "A video decoded alone gets all cores")
@pytest.mark.holds("docs/operations.md#what-can-a-broken-or-hostile-file-do", "a video that is decoded alone")
def test_a_lone_video_is_decoded_on_all_cores_and_videos_side_by_side_share_them(tmp_path: Path) -> None:
    others, all_cores = children_of(os.getpid()), os.sched_getaffinity(0)
    if len(all_cores) < 2:
        pytest.skip("one core is nothing to share")
    os.sched_setaffinity(0, sorted(all_cores)[:2])
    seen: dict[str, list[int]] = {}

    def count_threads(when: str, bench: Bench) -> None:
        threads = (len(list(Path(f"/proc/{child}/task").iterdir())) for child in bench.children)
        seen.setdefault(when, sorted(threads))

    try:
        with Pool(1, silence_seconds=30, max_decoded_bytes=CLIP_BYTES) as pool:
            lone = Bench(pool, tmp_path, others)
            lone.decode_clip(on_frame=lambda done, total: count_threads("lone", lone))
        with Pool(2, silence_seconds=30, max_decoded_bytes=60 * CLIP_BYTES) as pool:
            pair = Bench(pool, tmp_path, others)
            pair.decode_clip(
                on_frame=lambda done, total: (
                    done > 1 or pair.decode_clip(on_frame=lambda done, total: count_threads("second of two", pair))
                )
            )
    finally:
        os.sched_setaffinity(0, all_cores)
    assert seen["lone"][0] > 1
    assert seen["second of two"][0] == 1
