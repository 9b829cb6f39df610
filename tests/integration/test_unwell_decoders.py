"""Decoders on a host that ails: killed by the kernel, not to be started, short of handles, memory, a sound disk."""

import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Barrier, Event, Thread

import pytest

from keye.config.codes import ErrorCode
from keye.config.faults import Fault
from keye.worker.host_fault import HostFault
from keye.worker.media.decode import pool as pools
from keye.worker.media.decoded import DecodedImage
from keye.worker.sizing import Sizing
from tests.support.conditions import eventually
from tests.support.decoder_bench import CLIP_BYTES, Bench, Pool, handles
from tests.support.decoder_children import children_of


@pytest.fixture
def num_decoders() -> int:
    return 1


@pytest.fixture
def bench(tmp_path: Path, num_decoders: int) -> Iterator[Bench]:
    others = children_of(os.getpid())
    with Pool(num_decoders, silence_seconds=30, max_decoded_bytes=2 * CLIP_BYTES - 1) as pool:
        yield Bench(pool, tmp_path, others)


def strike(bench: Bench) -> None:
    """Kill all its children, and wait until they have ended."""
    for child in bench.children:
        os.kill(child, signal.SIGKILL)
        with suppress(ChildProcessError):  # the pool has taken note already
            os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)


@pytest.mark.holds("docs/operations.md#what-can-a-broken-or-hostile-file-do", "One dead child proves little")
@pytest.mark.parametrize("num_decoders", [8])
def test_pictures_whose_decoders_are_killed_side_by_side_pass_alone(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    """As the kernel does for want of memory."""
    all_in_one = Barrier(8, lambda: strike(bench))
    first_tries = iter([all_in_one.wait] * 8)
    num_at_work: list[int] = []
    decoded: SimpleQueue[object] = SimpleQueue()

    def look() -> None:
        num_at_work.append(sum(is_at_work(child) for child in bench.children))

    def read() -> None:
        try:
            decoded.put(bench.decode(bench.photo))
        except Exception as error:
            decoded.put(error)

    bench.pool.before_allocating = lambda: next(first_tries, look)()
    eventually(lambda: bench.pool.num_busy == 0, within_seconds=60)
    jobs = [Thread(target=read) for _ in range(8)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
    assert [type(decoded.get(timeout=0)) for _ in jobs] == [DecodedImage] * 8
    assert num_at_work == [1] * 8
    assert caplog.text.count("photo.png is tried once more, alone: its decoder was killed") == 8


@pytest.mark.holds(
    "docs/operations.md#what-can-a-broken-or-hostile-file-do", "is tried once more while no other is decoded"
)
@pytest.mark.parametrize("num_decoders", [2])
def test_a_suspect_waits_for_those_that_decode_and_goes_before_those_that_wait(bench: Bench) -> None:
    order: list[str] = []
    go_on, is_decoding, is_suspect = Event(), Event(), Event()

    def read(name: str, on_frame: Callable[[int, int], None] = lambda *_: None) -> Thread:
        path = bench.clip if name == "first" else bench.photo
        told = {"on_begin": lambda: order.append(name), "on_frame": on_frame}
        if name == "suspect":
            told["on_wait"] = lambda _: is_suspect.set()
        thread = Thread(target=bench.decode, args=[path], kwargs=told)
        thread.start()
        return thread

    def hold(done: int, total: int) -> None:
        is_decoding.set()
        assert go_on.wait(30)

    eventually(lambda: bench.pool.num_busy == 0, within_seconds=30)
    first = read("first", hold)
    assert is_decoding.wait(30)
    (of_first,) = (child for child in bench.children if is_at_work(child))
    bench.pool.before_allocating = lambda: order.count("suspect") == 1 and kill_others(bench, of_first)
    suspect = read("suspect")
    assert is_suspect.wait(30)
    last = read("last")
    looks = [None] * 5
    with pytest.raises(IndexError):
        bench.decode(bench.photo, check=looks.pop)  # that one is over ends its wait
    assert order == ["first", "suspect"]
    go_on.set()
    for thread in (first, suspect, last):
        thread.join(30)
    assert order == ["first", "suspect", "suspect", "last"]


def is_at_work(child: int) -> bool:
    """Whether it holds a medium."""
    with suppress(OSError):  # it ends meanwhile
        held = {os.path.basename(os.readlink(handle)) for handle in Path(f"/proc/{child}/fd").iterdir()}
        return not held.isdisjoint({"clip.mp4", "photo.png"})
    return False


def kill_others(bench: Bench, but: int) -> None:
    for child in bench.children - {but}:
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("num_decoders", [2])
def test_a_suspect_that_waits_for_room_lets_those_decode_that_have_it(bench: Bench) -> None:
    outcome: SimpleQueue[int] = SimpleQueue()
    begun: list[None] = []
    has_no_room = Event()

    def waits(wanted: str) -> None:
        if wanted == "memory":
            has_no_room.set()

    def strike_once() -> None:
        bench.pool.before_allocating = lambda: None
        strike(bench)

    told = {"on_wait": waits, "on_begin": lambda: begun.append(None)}
    with bench.pool.share() as share:
        held = bench.decode_clip(share=share)
        eventually(lambda: bench.pool.num_busy == 0, within_seconds=30)
        bench.pool.before_allocating = strike_once
        suspect = Thread(target=lambda: outcome.put(len(bench.decode_clip(**told).frames)))
        suspect.start()
        assert has_no_room.wait(30)
        also_held = bench.decode_clip(share=share)
    assert outcome.empty()
    del held, also_held
    suspect.join(30)
    assert outcome.get(timeout=0) == 30


def test_a_child_that_fails_on_a_medium_each_time_tells_why_in_the_log(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    impossible = Sizing(factor=0, min_pixels=4, max_pixels=96 * 160)
    with pytest.raises(Fault, match=r"clip\.mp4: its decoder ended with status 1"):
        bench.decode_clip(sizing=impossible)
    printed = [record.getMessage() for record in caplog.records if "printed:" in record.getMessage()]
    assert len(printed) == 2
    assert all("Traceback (most recent call last)" in each and "ZeroDivisionError" in each for each in printed)
    assert "want of memory" not in caplog.text
    bench.assert_works()


@pytest.mark.holds(
    "docs/operations.md#what-can-a-broken-or-hostile-file-do", "What a child prints is in the worker's log"
)
def test_what_a_child_prints_reaches_a_log_that_is_a_file(tmp_path: Path) -> None:
    """A child may not write to files, this one neither."""
    code = f"""
import logging
from pathlib import Path
from keye.worker.sizing import Sizing
from tests.support.decoder_bench import Bench, Pool
logging.basicConfig()
with Pool(1, silence_seconds=30, max_decoded_bytes=2**24) as pool:
    Bench(pool, Path({str(tmp_path)!r}), set()).decode_clip(sizing=Sizing(factor=0, min_pixels=4, max_pixels=9))
"""
    with (tmp_path / "log").open("w") as log:
        subprocess.run([sys.executable, "-c", code], stderr=log, check=False)
    assert re.search(r"Decoder \d+ printed:\n +Traceback", (tmp_path / "log").read_text())


def test_a_child_that_prints_without_end_is_held_up_by_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    flood = "while True: os.write(2, b'\\x1b[31mnoise\\n' * 1000)"
    customized(f"import contextlib\nwith contextlib.suppress(BlockingIOError):\n    {flood}")(monkeypatch, tmp_path)
    others = children_of(os.getpid())
    with Pool(1, silence_seconds=30, max_decoded_bytes=2**24) as pool:
        Bench(pool, tmp_path, others).assert_works()
    assert 1000 < len(caplog.text) < 100_000
    assert "    \\x1b[31mnoise\n" in caplog.text


def customized(code: str) -> Callable[[pytest.MonkeyPatch, Path], None]:
    """Every child runs it first from now on."""

    def customize(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        (folder / "sitecustomize.py").write_text(f"import os\n{code}")
        monkeypatch.syspath_prepend(folder)

    return customize


def take_handles_but(num_left: int) -> None:
    """Of this process. The limit alone would leave those below it that are free now."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, handles()))
    while (filler := os.dup(0)) < highest:
        FILLERS.append(filler)
    os.close(filler)
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1 + num_left, hard))


FILLERS: list[int] = []


@pytest.mark.holds(
    "docs/operations.md#what-can-a-broken-or-hostile-file-do", "are lower than a child's own are kept to"
)
@pytest.mark.parametrize(("limit", "value"), [("AS", 3 * 2**30), ("CPU", 600), ("FSIZE", 2**21), ("CORE", 0)])
def test_a_hard_limit_lower_than_ours_is_lived_with(tmp_path: Path, limit: str, value: int) -> None:
    code = f"""
import ctypes, resource
from pathlib import Path
from tests.support.decoder_bench import Bench, Pool
pool = Pool(1, silence_seconds=30, max_decoded_bytes=2**24)
bench = Bench(pool, Path({str(tmp_path)!r}), set())
ctypes.CDLL(None).prctl(24, 24)  # root's children, too, may raise no limit from now on
resource.setrlimit(resource.RLIMIT_{limit}, ({value}, {value}))
with pool:
    bench.assert_works()
    bench.assert_works()
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("num_decoders", [2])
def test_a_child_without_memory_says_nothing_of_its_medium(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    eventually(lambda: bench.pool.num_busy == 0, within_seconds=30)
    pinched = set()

    def pinch() -> None:
        """Of whoever asks for memory first."""
        bench.pool.before_allocating = lambda: None
        pinched.update(child for child in bench.children if is_at_work(child))
        for child in pinched:
            resource.prlimit(child, resource.RLIMIT_AS, (2**20, 2**20))

    bench.pool.before_allocating = pinch
    bench.assert_works()
    assert "takes more memory to decode than a decoder may have" in caplog.text
    assert pinched.isdisjoint(bench.children)


UNSTARTABLE = {
    "no interpreter": (r"No such file", lambda patch, _: patch.setattr(sys, "executable", "/gone")),
    "dies": (r"status 3 before it came up \(out of order\)", customized("os.write(2, b'out of order'); os._exit(3)")),
    "is killed": (r"status -9 before it came up \(silently\)", customized("os.kill(os.getpid(), 9)")),
    "hangs": (r"No decoder has come up within", customized("import time; time.sleep(99)")),
    "no handles": (r"Too many open files", lambda *_: take_handles_but(1)),
}


@pytest.mark.holds(
    "docs/operations.md#what-can-a-broken-or-hostile-file-do", "the log says why, once, and no medium is blamed"
)
@pytest.mark.parametrize("how", UNSTARTABLE)
def test_where_no_decoder_can_be_started_jobs_are_told_so_at_once_until_one_can(
    bench: Bench, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reason, sicken = UNSTARTABLE[how]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    bench.assert_works()
    held = len(handles())
    try:
        with monkeypatch.context() as patch:
            if how == "hangs":
                patch.setattr(pools, "_PATIENCE_SECONDS", 1)
            sicken(patch, tmp_path)
            strike(bench)
            for _ in range(3):
                began = time.monotonic()
                with pytest.raises(HostFault, match=reason):
                    bench.decode(bench.photo)
                assert time.monotonic() - began < 10
            told_at = bench.pool._refused_at
            eventually(lambda: how == "hangs" or bench.pool._refused_at > told_at + 1.5, within_seconds=30)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        while FILLERS:
            os.close(FILLERS.pop())
    strike(bench)  # one that hangs still
    eventually(lambda: isinstance(outcome_of(lambda: bench.decode(bench.photo)), DecodedImage), within_seconds=30)
    assert caplog.text.count("No decoder can be started") == 1
    eventually(lambda: len(handles()) == held)


def outcome_of(act: Callable[[], object]) -> object:
    try:
        return act()
    except HostFault as fault:
        return fault


@pytest.mark.parametrize("num_decoders", [2])
def test_jobs_go_on_with_the_decoders_there_are(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    eventually(lambda: bench.pool.num_busy == 0, within_seconds=30)
    monkeypatch.setattr(sys, "executable", "/gone")
    os.kill(bench.children.pop(), signal.SIGKILL)
    for _ in range(3):
        bench.assert_works()
    eventually(lambda: "No decoder can be started" in caplog.text)
    monkeypatch.undo()
    eventually(lambda: "Decoders can be started again" in caplog.text and len(bench.children) == 2)
    assert caplog.text.count("No decoder can be started") == 1


def test_a_medium_whose_disk_fails_is_not_blamed(bench: Bench) -> None:
    bench.assert_works()
    child = bench.child
    # Reading memory where there is none is an error of input and output.
    for name in ("photo.png", "clip.mp4"):
        link = bench.photo.parent / f"sick-{name}"
        link.symlink_to("/proc/self/mem")
        with pytest.raises(HostFault, match=r"cannot be read: \[Errno 5\] Input/output error"):
            bench.decode(link)
    assert bench.child == child
    bench.assert_works()


@pytest.mark.parametrize("of_whom", ["worker", "child, the file", "child, the memory"])
def test_want_of_handles_blames_no_medium_and_leaves_nothing_behind(bench: Bench, of_whom: str) -> None:
    bench.assert_works()
    child, held = bench.child, len(handles())
    pid = os.getpid() if of_whom == "worker" else child
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)

    def run_out() -> None:
        bench.pool.before_allocating = lambda: None
        num_open = len(os.listdir(f"/proc/{pid}/fd"))
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (3 if pid == os.getpid() else num_open, limits[1]))

    bench.pool.before_allocating = run_out
    if of_whom == "child, the file":
        run_out()
    try:
        with pytest.raises((OSError, HostFault), match=r"Too many open files|handle did not reach"):
            bench.decode_clip()
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
    bench.assert_works()
    assert bench.child == child
    assert len(handles()) == held


def test_videos_are_decoded_where_the_host_has_no_more_threads(tmp_path: Path) -> None:
    code = f"""
import os, resource
from pathlib import Path
from keye.config.job import VideoPart
from keye.worker.media.frames.video import decode_video
from keye.worker.sizing import Sizing
from tests.support.zoo import encode_clip, read_number, steady_times
with encode_clip(Path({str(tmp_path)!r}) / "clip.mp4", steady_times(30)).open("rb") as clip:
    os.setresuid(65534, 65534, 65534)  # nobody, since limits on processes bind no root
    resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
    fit = Sizing(factor=2, min_pixels=4, max_pixels=96 * 160).fit_video
    video = decode_video(clip, VideoPart(uri="file:", fps=30), fit, 10**6, num_threads=8)
print([read_number(frame) for frame in video.frames] == list(range(30)), video.frames_corrupt)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.stdout.split() == ["True", "0"], ran.stderr


def test_a_medium_that_takes_its_decoder_down_each_time_is_to_blame(bench: Bench) -> None:
    bench.pool.before_allocating = lambda: strike(bench)
    with pytest.raises(Fault, match=r"clip\.mp4: its decoder was killed, most likely for want of memory") as caught:
        bench.decode_clip()
    assert caught.value.code is ErrorCode.MEDIA_TOO_LARGE
    bench.pool.before_allocating = lambda: None
    bench.assert_works()
