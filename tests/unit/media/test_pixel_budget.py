"""The bound on the pixels of all jobs: who gets room, who waits, and that nobody does for ever."""

import os
import resource
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from mmap import mmap
from random import Random

import pytest

from keye.worker.media.decode.pixel_budget import PixelBudget, PixelClaim, PixelShare

MOST = 12


class Owner:
    """Something made of pixels."""


def ask(budget: PixelBudget, share: PixelShare, num_bytes: int, claim: PixelClaim | None = None) -> mmap | None:
    """For a medium of a job; for the same again with its `claim`."""
    if claim is None:
        share.claims.append(claim := PixelClaim())
    if (allocated := budget.allocate(claim, num_bytes)) is None:
        return None
    os.close(allocated[1])
    return allocated[0]


def test_memory_that_could_not_be_had_does_not_count() -> None:
    budget = PixelBudget(max_bytes=4096)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with budget.share() as unlucky:
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
        try:
            with pytest.raises(OSError, match="Too many open files"):
                ask(budget, unlucky, 4096)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    with budget.share() as next_job:
        assert ask(budget, next_job, 4096)


def test_what_is_kept_counts_until_nothing_refers_to_it() -> None:
    budget, owner = PixelBudget(max_bytes=MOST), Owner()
    budget.keep(owner, MOST + 1)  # it is there already: there is nothing to wait for
    assert budget.num_bytes == MOST + 1
    with budget.share() as share:
        assert ask(budget, share, 1) is None
        del owner
        assert ask(budget, share, MOST, share.claims[0])
    assert budget.num_bytes == 0


def test_the_eldest_job_waits_for_what_goes_by_itself_rather_than_pass_the_bound() -> None:
    budget, generation = PixelBudget(max_bytes=MOST), Owner()
    budget.keep(generation, 4)
    with budget.share() as eldest, budget.share() as other:
        others = ask(budget, other, 5)
        assert ask(budget, eldest, 6) is None
        del generation  # what the other decodes now ends by itself, too
        assert not budget.has_room(eldest.claims[0]) or budget.num_bytes + 6 <= MOST
        del others
        assert ask(budget, eldest, 6, eldest.claims[0])


def test_the_eldest_job_passes_the_bound_once_all_that_hold_memory_wait_too() -> None:
    budget = PixelBudget(max_bytes=MOST)
    with budget.share() as eldest, budget.share() as other:
        held = [ask(budget, eldest, 5), ask(budget, other, 5)]
        assert ask(budget, eldest, 5) is None
        assert ask(budget, other, 5) is None
        held.append(ask(budget, eldest, 5, eldest.claims[-1]))
        assert ask(budget, other, 5, other.claims[-1]) is None
        assert None not in held
        assert budget.num_bytes == 15


def test_others_get_only_what_leaves_room_for_the_eldest_that_waits() -> None:
    budget, generation = PixelBudget(max_bytes=MOST), Owner()
    budget.keep(generation, 6)
    with budget.share() as eldest, budget.share() as other:
        assert ask(budget, eldest, 8) is None
        assert ask(budget, other, 1) is None
        del generation
        assert ask(budget, other, 5, other.claims[0]) is None
        small = ask(budget, other, 4, other.claims[0])
        assert small
        assert ask(budget, eldest, 8, eldest.claims[0])


def test_what_is_kept_for_later_makes_room_before_anybody_waits() -> None:
    kept: list[mmap] = []
    budget = PixelBudget(max_bytes=MOST, drop=lambda: bool(kept) and bool(kept.pop(0)))
    with budget.share() as before:
        kept += [memory for memory in (ask(budget, before, 4) for _ in range(3)) if memory]
    with budget.share() as share:
        assert ask(budget, share, 5)
        assert len(kept) == 1
        generation = Owner()
        budget.keep(generation, 9)
        assert kept == []


def test_the_job_that_waits_for_anothers_decoding_lends_it_its_turn() -> None:
    """Or it would hold what the other waits for, and wait for the other."""
    budget = PixelBudget(max_bytes=MOST)
    with budget.share() as eldest, budget.share() as other:
        held = ask(budget, eldest, 8)
        assert ask(budget, other, 8) is None
        eldest.claims.append(other.claims[0])
        assert ask(budget, other, 8, other.claims[0])
        assert held


@dataclass(eq=False)
class Job:
    """Its media, decoded one after another or side by side, then what it has become while an answer is generated."""

    wanted: list[int]
    share: PixelShare
    opened: ExitStack
    pixels: list[mmap] = field(default_factory=list)
    generation: Owner | None = None

    def steps(self, budget: PixelBudget) -> Iterator[bool]:
        """Each is tried again while it gives False, as it waits then."""
        for claim in [PixelClaim() for _ in self.wanted]:
            self.share.claims.append(claim)
        for claim, num_bytes in zip(self.share.claims, self.wanted, strict=True):
            while (memory := ask(budget, self.share, num_bytes, claim)) is None:
                yield False
            self.pixels.append(memory)
            yield True
        self.opened.close()
        yield True
        self.generation = Owner()
        budget.keep(self.generation, 1)
        del memory
        self.pixels.clear()
        yield True
        self.generation = None


@pytest.mark.parametrize("seed", range(200))
def test_in_whatever_order_jobs_go_on_each_ends_and_no_more_is_held_than_they_need(seed: int) -> None:
    """All that can be done next is tried, in a random order: once nothing can be, jobs wait for each other for ever."""
    random = Random(seed)
    kept: list[mmap] = []
    budget = PixelBudget(MOST, drop=lambda: bool(kept) and bool(kept.pop(0)))
    waiting, under_way = [[random.randint(1, 4) for _ in range(random.randint(1, 3))] for _ in range(12)], []
    num_idle = 0
    while waiting or under_way:
        if waiting and random.random() < 0.3:
            opened = ExitStack()
            job = Job(waiting.pop(), opened.enter_context(budget.share()), opened)
            under_way.append((job, job.steps(budget)))
        has_moved = False
        for job, steps in random.sample(under_way, len(under_way)):
            step = next(steps, None)
            if step is None:
                under_way = [each for each in under_way if each[0] is not job]
            if job.pixels and random.random() < 0.3:
                kept.append(job.pixels[-1])
            has_moved |= step is not False
            # The eldest may pass the bound by what one job may have; the marks of those that generate never wait.
            assert budget.num_bytes <= 2 * MOST + len(under_way)
            if step is not False and random.random() < 0.5:
                break
        # In the first round without a move the last job may have begun to wait.
        num_idle = 0 if has_moved or waiting else num_idle + 1
        assert num_idle < 2
    kept.clear()
    del job, steps
    assert budget.num_bytes == 0
