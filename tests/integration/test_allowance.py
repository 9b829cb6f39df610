"""What a decoder child may take for a medium: set from outside, whatever the child makes of it."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from keye.config.codes import ErrorCode
from keye.config.faults import Fault
from keye.worker.media.decode.allowance import WORKING_BYTES, Allowance
from tests.support.decoder_bench import Bench, Pool
from tests.support.decoder_children import children_of
from tests.support.image_bombs import jpeg_of_scans

LIMITS = {"max_image_cpu_seconds": 1, "max_image_pixels": 10**8}


@pytest.fixture
def child() -> Iterator[subprocess.Popen[str]]:
    """It runs the line of Python that it is sent."""
    line = "import sys; exec(sys.stdin.readline())"
    with subprocess.Popen([sys.executable, "-c", line], stdin=-1, stdout=-1, text=True) as process:
        yield process
        process.kill()


@pytest.mark.holds("docs/design.md#decisions", "with bounds on memory and time")
@pytest.mark.holds(
    "docs/operations.md#what-can-a-broken-or-hostile-file-do", "holds at most 4 GiB besides its code and the pixels"
)
def test_memory_of_a_child_ends_at_its_limit(child: "subprocess.Popen[str]") -> None:
    Allowance(child.pid).grant(pixel_bytes=0, cpu_seconds=10)
    code = f"try: bytearray({WORKING_BYTES})\nexcept MemoryError: print('refused')"
    assert child.communicate(f"exec({code!r})")[0] == "refused\n"


def test_a_limit_is_set_anew_for_each_medium_and_lets_none_run_on_between_them(child: "subprocess.Popen[str]") -> None:
    allowance = Allowance(child.pid)
    for _ in range(2):
        allowance.grant(pixel_bytes=2**20, cpu_seconds=100)
        assert resource.prlimit(child.pid, resource.RLIMIT_AS)[0] == WORKING_BYTES + 2**20
        assert 100 <= resource.prlimit(child.pid, resource.RLIMIT_CPU)[0] <= 102
    allowance.end()
    child.communicate("while True: pass")
    assert child.returncode == -signal.SIGXCPU


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    others = children_of(os.getpid())
    (tmp_path / "scans.jpg").write_bytes(jpeg_of_scans(5000))
    with Pool(1, silence_seconds=30, max_decoded_bytes=2**24) as pool:
        yield Bench(pool, tmp_path, others)


@pytest.mark.holds(
    "docs/operations.md#what-can-a-broken-or-hostile-file-do",
    "An image may take `KEYE_MAX_IMAGE_CPU_SECONDS` (10) of CPU time, a video 30 minutes",
)
def test_an_image_that_takes_its_cpu_time_ends_with_the_name_of_the_limit_and_a_video_may_take_more(
    bench: Bench, tmp_path: Path
) -> None:
    bench.assert_works()
    child = bench.child
    began_at = time.monotonic()
    with pytest.raises(Fault) as caught:
        bench.decode(tmp_path / "scans.jpg", limits=LIMITS)
    assert time.monotonic() - began_at < 15
    assert caught.value.code is ErrorCode.MEDIA_TOO_LARGE
    assert caught.value.message == (
        "scans.jpg: takes more than 1 s of CPU time to decode (KEYE_MAX_IMAGE_CPU_SECONDS). Send it as a plain PNG or "
        "JPEG."
    )
    granted: list[int] = []
    bench.pool.before_allocating = lambda: granted.append(resource.prlimit(bench.child, resource.RLIMIT_CPU)[0])
    bench.decode_clip(limits=LIMITS)
    assert 1800 <= granted[0] <= 1810
    assert bench.child != child


def test_a_child_that_does_not_heed_the_kernels_signal_is_ended_all_the_same(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    bench.assert_works()
    os.kill(bench.child, signal.SIGKILL)
    began_at = time.monotonic()
    with pytest.raises(Fault, match="takes more than 1 s of CPU time"):
        bench.decode(tmp_path / "scans.jpg", limits=LIMITS)
    assert time.monotonic() - began_at < 25
    bench.assert_works()
