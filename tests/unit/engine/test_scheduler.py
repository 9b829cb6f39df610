"""Who runs and whose the blocks are, over whole lives of random jobs. No model is needed for that."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keye.worker.engine.block_pool import BlockPool
from keye.worker.engine.scheduler import Scheduler
from keye.worker.engine.sequence import Sequence
from keye.worker.engine.step_plan import StepLimits, StepPlan

MakeSequence = Callable[..., Sequence]
BLOCK_SIZE = 4
NUM_BLOCKS = 12

jobs = st.lists(
    st.tuples(
        st.integers(1, 30),  # tokens of the prompt
        st.integers(1, 18),  # new tokens: together never more than the pool holds
        st.integers(0, 2),  # priority
        st.integers(0, 12),  # the step it arrives in
        st.one_of(st.none(), st.integers(0, 20)),  # the step it is abandoned in
    ),
    min_size=1,
    max_size=14,
)


def assert_blocks_add_up(scheduler: Scheduler) -> None:
    owned = [block for sequence in scheduler for block in sequence.block_table]
    assert len(owned) == len(set(owned)), "two sequences share a block"
    assert len(owned) + scheduler.pool.num_free == NUM_BLOCKS, "a block leaked"
    assert not any(sequence.block_table for sequence in scheduler.waiting)


def assert_plan_is_allowed(scheduler: Scheduler, plan: StepPlan) -> None:
    limits = scheduler.limits
    assert len(scheduler.running) <= limits.max_running
    assert sum(chunk.num_tokens for chunk in plan.chunks) <= limits.max_step_tokens
    for sequence, num_tokens in plan.chunks:
        assert 1 <= num_tokens <= sequence.num_uncached
        assert sequence.num_cached + num_tokens <= len(sequence.block_table) * BLOCK_SIZE
    decoding = {sequence for sequence in scheduler.running if sequence.is_decoding}
    assert decoding <= {sequence for sequence, _ in plan.chunks}, "a decoding sequence was left out"


@pytest.mark.holds("docs/design.md#one-job-walked", "plan (who goes on, who is preempted, who is admitted)")
@settings(max_examples=300, deadline=None)
@given(jobs=jobs, max_running=st.integers(1, 5), max_step_tokens=st.integers(5, 24))
def test_every_job_ends_and_no_block_is_leaked_or_shared(
    make_sequence: MakeSequence, jobs: list[tuple[int, ...]], max_running: int, max_step_tokens: int
) -> None:
    scheduler = Scheduler(BlockPool(NUM_BLOCKS, BLOCK_SIZE), StepLimits(max_running, max_step_tokens))
    arriving = [
        (arrives, abandoned, make_sequence([0] * prompt, priority, max_new_tokens=new))
        for prompt, new, priority, arrives, abandoned in jobs
    ]
    ended: set[Sequence] = set()
    step = 0
    while len(ended) < len(jobs):
        for arrives, abandoned, sequence in arriving:
            if arrives == step:
                scheduler.add(sequence)
            if abandoned == step and arrives <= step and sequence not in ended:
                scheduler.remove(sequence)
                ended.add(sequence)
        plan = scheduler.start_step()
        assert_blocks_add_up(scheduler)
        assert_plan_is_allowed(scheduler, plan)
        assert plan.chunks or scheduler.is_idle, "sequences are there, but none of them moves"
        for chunk in plan.chunks:
            sequence = chunk.sequence
            reaches_end = chunk.reaches_end
            sequence.num_cached += chunk.num_tokens
            if reaches_end and sequence.append(0, now=0):
                scheduler.remove(sequence)
                ended.add(sequence)
        step += 1
        assert step < 2000, "the jobs do not come to an end"
    assert scheduler.is_idle
    assert scheduler.pool.num_free == NUM_BLOCKS


def run_steps(scheduler: Scheduler, num_steps: int) -> list[StepPlan]:
    plans = []
    for _ in range(num_steps):
        plans.append(scheduler.start_step())
        for chunk in plans[-1].chunks:
            reaches_end = chunk.reaches_end
            chunk.sequence.num_cached += chunk.num_tokens
            if reaches_end and chunk.sequence.append(0, now=0):
                scheduler.remove(chunk.sequence)
    return plans


def make_scheduler(max_running: int = 8, max_step_tokens: int = 64) -> Scheduler:
    return Scheduler(BlockPool(NUM_BLOCKS, BLOCK_SIZE), StepLimits(max_running, max_step_tokens))


@pytest.mark.holds("docs/design.md#decisions", "no job waits for another's long answer")
def test_running_jobs_keep_stepping_while_a_long_prompt_comes_in(make_sequence: MakeSequence) -> None:
    scheduler = make_scheduler(max_step_tokens=5)
    short = make_sequence([0] * 3, max_new_tokens=12)
    scheduler.add(short)
    run_steps(scheduler, 1)
    long = make_sequence([0] * 20)
    scheduler.add(long)
    plans = run_steps(scheduler, 5)
    assert [[(chunk.sequence is short, chunk.num_tokens) for chunk in plan.chunks] for plan in plans] == [
        [(True, 1), (False, 4)]
    ] * 5
    assert long.is_decoding


def test_large_prompt_that_waits_for_blocks_is_not_overtaken(make_sequence: MakeSequence) -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence([0] * 24, max_new_tokens=20))
    run_steps(scheduler, 1)
    large, small = make_sequence([0] * 24), make_sequence([0])
    scheduler.add(large)
    scheduler.add(small)
    run_steps(scheduler, 3)
    assert scheduler.waiting == [large, small]
    run_steps(scheduler, 20)
    assert large.generated_ids
    assert small.generated_ids


@pytest.mark.holds("docs/design.md#one-job-walked", "Who came first goes first")
def test_higher_priority_goes_first_and_then_who_came_first(make_sequence: MakeSequence) -> None:
    scheduler = make_scheduler(max_running=1)
    low, high, low_later = make_sequence([0], 6), make_sequence([0], 0), make_sequence([0], 6)
    for sequence in (low, high, low_later):
        scheduler.add(sequence)
    admitted = [sequence for plan in run_steps(scheduler, 30) for sequence in plan.admitted]
    assert admitted == [high, low, low_later]


@pytest.mark.holds("docs/design.md#one-job-walked", "so nobody waits for ever behind a flow of higher priority")
@settings(deadline=None)
@given(priority=st.integers(1, 6))
def test_steady_flow_of_higher_priority_holds_a_lower_one_up_for_ten_seconds_a_step(
    make_sequence: MakeSequence, priority: int
) -> None:
    """One place, one job a second for it, and each takes a second."""
    scheduler = make_scheduler(max_running=1)
    low = make_sequence([0], priority, max_new_tokens=1)
    low.pending.submitted_at = 0
    scheduler.add(low)
    second = 0
    while not low.generated_ids:
        second += 1
        assert second <= 10 * priority + 1, "it is overtaken for ever"
        high = make_sequence([0], 0, max_new_tokens=1)
        high.pending.submitted_at = second
        scheduler.add(high)
        run_steps(scheduler, 1)
    assert second >= 10 * priority


def test_youngest_are_preempted_when_fewer_may_run_than_do(make_sequence: MakeSequence) -> None:
    scheduler = make_scheduler()
    sequences = [make_sequence([0], max_new_tokens=12) for _ in range(4)]
    for sequence in sequences:
        scheduler.add(sequence)
    run_steps(scheduler, 2)
    scheduler.limits = StepLimits(max_running=2, max_step_tokens=2)
    (plan,) = run_steps(scheduler, 1)
    assert plan.preempted == sequences[2:]
    assert [chunk.sequence for chunk in plan.chunks] == sequences[:2]
    run_steps(scheduler, 30)
    assert [len(sequence.generated_ids) for sequence in sequences] == [12] * 4


def test_youngest_is_preempted_when_blocks_run_out_and_comes_back(make_sequence: MakeSequence) -> None:
    scheduler = make_scheduler()
    old, young = make_sequence([0] * 20, max_new_tokens=24), make_sequence([0] * 16, max_new_tokens=24)
    scheduler.add(old)
    scheduler.add(young)
    plans = run_steps(scheduler, 60)
    assert [sequence for plan in plans for sequence in plan.preempted] == [young]
    assert len(old.generated_ids) == len(young.generated_ids) == 24


def test_pool_refuses_to_hand_out_more_than_it_has() -> None:
    pool = BlockPool(4, BLOCK_SIZE)
    pool.take(3)
    with pytest.raises(ValueError, match="2 blocks are asked for, 1 of 4 are free"):
        pool.take(2)
    assert pool.num_free == 1
