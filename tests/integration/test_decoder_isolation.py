"""`KEYE_DECODER_ISOLATION=job`: whatever a medium made of its decoder, no other job's media meet it."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Thread

import pytest

from keye.config.settings import Settings
from keye.worker.media.decoded import DecodedImage
from tests.support.conditions import eventually
from tests.support.decoder_bench import Bench, Pool
from tests.support.decoder_children import children_of


@pytest.fixture
def num_decoders() -> int:
    return 1


@pytest.fixture
def bench(tmp_path: Path, num_decoders: int) -> Iterator[Bench]:
    others = children_of(os.getpid())
    with Pool(num_decoders, silence_seconds=30, max_decoded_bytes=2**24, isolation="job") as pool:
        yield Bench(pool, tmp_path, others)


def has_handles_of(child: int, name: str) -> bool:
    for handle in Path(f"/proc/{child}/fd").iterdir():
        # One that is starting opens and closes many.
        with suppress(FileNotFoundError):
            if name in os.readlink(handle):
                return True
    return False


def decode_twice(bench: Bench) -> set[int]:
    """Two media of one job; the children that had them."""
    used: set[int] = set()
    bench.pool.before_allocating = lambda: used.update(c for c in bench.children if has_handles_of(c, "photo.png"))
    with bench.pool.share() as share:
        for _ in range(2):
            assert isinstance(bench.decode(bench.photo, share=share), DecodedImage)
    return used


@pytest.mark.holds(
    "docs/operations.md#what-can-a-broken-or-hostile-file-do",
    "With `KEYE_DECODER_ISOLATION=job` a child ends with its job",
)
def test_media_of_a_job_share_a_child_and_no_other_job_meets_it(bench: Bench) -> None:
    used = [decode_twice(bench) for _ in range(3)]
    assert [len(each) for each in used] == [1, 1, 1]
    assert len(set.union(*used)) == 3
    assert bench.children.isdisjoint(set.union(*used))


@pytest.mark.holds(
    "docs/operations.md#what-can-a-broken-or-hostile-file-do",
    "Those of the next jobs, as many as it has decoders, are started ahead, so at most twice as many run",
)
def test_the_next_jobs_child_is_started_while_a_job_has_the_one_before(bench: Bench) -> None:
    with bench.pool.share() as share:
        bench.decode(bench.photo, share=share)
        eventually(lambda: len(bench.children) == 2)
        bench.decode(bench.photo, share=share)
        assert len(bench.children) == 2
    assert len(bench.children) == 1
    assert bench.pool.num_busy == 0


@pytest.mark.parametrize("num_decoders", [2])
def test_jobs_side_by_side_have_children_of_their_own_and_no_more_of_them_than_there_are_decoders(
    bench: Bench,
) -> None:
    failed: list[BaseException] = []
    most = 0

    def look() -> None:
        nonlocal most
        most = max(most, len(bench.children))

    def run_job() -> None:
        try:
            with bench.pool.share() as share:
                for _ in range(3):
                    bench.decode(bench.photo, share=share)
        except BaseException as error:
            failed.append(error)

    bench.pool.before_allocating = look
    jobs = [Thread(target=run_job) for _ in range(6)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
    assert failed == []
    assert 2 <= most <= 4
    eventually(lambda: len(bench.children) == 2)


def test_room_is_reckoned_for_the_children_that_wait() -> None:
    assert Settings(decoders=3).num_decoder_processes == 3
    assert Settings(decoders=3, decoder_isolation="job").num_decoder_processes == 6
