"""Sequences that share blocks, over whole lives of random jobs: what a block holds is what each that has it wrote."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keye.worker.engine.block_keys import BlockKeys
from keye.worker.engine.block_pool import BlockPool
from keye.worker.engine.scheduler import Scheduler
from keye.worker.engine.sequence import Sequence
from keye.worker.engine.step_plan import Chunk, StepLimits, StepPlan
from keye.worker.model.processor import PreparedPrompt

MakeSequence = Callable[..., Sequence]
BLOCK_SIZE = 4
NUM_BLOCKS = 12


def tokens_of(sequence: Sequence) -> list[int]:
    return [*sequence.pending.prompt.input_ids.tolist(), *sequence.generated_ids]


@dataclass
class PaperEngine:
    """Steps sequences without a model: in place of keys and values a slot holds all tokens up to its own."""

    scheduler: Scheduler
    slots: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)
    num_computed: int = 0
    num_preempted: int = 0

    @classmethod
    def of(cls, **limits: int) -> "PaperEngine":
        return cls(Scheduler(BlockPool(NUM_BLOCKS, BLOCK_SIZE), StepLimits(**limits)))

    def step(self, part: float = 1, is_finite: bool = True) -> StepPlan:
        """One step; of each chunk of several tokens only a `part` is computed where memory has run out."""
        plan = self.scheduler.start_step()
        self.num_preempted += len(plan.preempted)
        # Wiped before anything is written, as the engine does it.
        for block in self.scheduler.unproven:
            for place in range(BLOCK_SIZE):
                self.slots.pop((block, place), None)
        self.scheduler.unproven.clear()
        for sequence, num_tokens in plan.chunks:
            self._compute(Chunk(sequence, max(1, int(part * num_tokens))), is_finite)
        self.check()
        return plan

    def _compute(self, chunk: Chunk, is_finite: bool) -> None:
        sequence, num_tokens = chunk
        tokens, reaches_end = tokens_of(sequence), chunk.reaches_end
        for place in range(sequence.num_cached, sequence.num_cached + num_tokens):
            block = sequence.block_table[place // BLOCK_SIZE]
            holders = [other for other in self.scheduler.running if block in other.block_table]
            assert holders == [sequence], "a block is written while it is shared"
            self.slots[block, place % BLOCK_SIZE] = tuple(tokens[: place + 1])
        sequence.num_cached += num_tokens
        self.num_computed += num_tokens
        if not reaches_end:
            return
        if not is_finite:
            self.scheduler.remove(sequence)
            return
        self.scheduler.publish(sequence)
        if sequence.append(sum(tokens) % 3, now=0):
            self.scheduler.remove(sequence)

    def check(self) -> None:
        pool, running = self.scheduler.pool, self.scheduler.running
        held = Counter(block for sequence in running for block in sequence.block_table)
        assert pool.num_free == NUM_BLOCKS - len(held), "a block leaked"
        assert pool.num_freed(sequence.block_table for sequence in running) == len(held), "holders are counted wrongly"
        assert not any(sequence.block_table for sequence in self.scheduler.waiting)
        for sequence in running:
            tokens = tokens_of(sequence)
            for place in range(sequence.num_cached):
                slot = sequence.block_table[place // BLOCK_SIZE], place % BLOCK_SIZE
                assert self.slots[slot] == tuple(tokens[: place + 1]), "a block holds something else"


# Few beginnings, of few tokens: most jobs share a part with another, and generate what a later one may ask.
prompts = st.builds(
    lambda beginning, length, rest: (beginning * 30)[:length] + rest,
    st.sampled_from([[0], [0, 1], [2, 0, 1]]),
    st.integers(1, 26),
    st.lists(st.integers(0, 2), max_size=4),
)
jobs = st.lists(
    st.tuples(
        prompts,
        st.integers(1, 18),  # new tokens: together never more than the pool holds
        st.integers(0, 2),  # priority
        st.integers(0, 12),  # the step it arrives in
        st.one_of(st.none(), st.integers(0, 20)),  # the step it is abandoned in
    ),
    min_size=1,
    max_size=14,
)
# How memory and numbers do in one step: all is well, or a part of a chunk fits, or what comes out is not finite.
luck = st.one_of(
    st.just((1.0, True)), st.just((1.0, True)), st.tuples(st.floats(0.1, 1), st.just(True)), st.just((1.0, False))
)


@pytest.mark.holds("docs/design.md#decisions", "a block is never written while two read it")
@settings(max_examples=300, deadline=None)
@given(jobs=jobs, max_running=st.integers(1, 5), max_step_tokens=st.integers(5, 24), fates=st.lists(luck, max_size=40))
def test_blocks_hold_what_each_of_their_sequences_would_have_written(
    make_sequence: MakeSequence,
    jobs: list[tuple[Any, ...]],
    max_running: int,
    max_step_tokens: int,
    fates: list[tuple[float, bool]],
) -> None:
    engine = PaperEngine.of(max_running=max_running, max_step_tokens=max_step_tokens)
    scheduler = engine.scheduler
    arriving = [
        (arrives, abandoned, make_sequence(prompt, priority, max_new_tokens=new, block_size=BLOCK_SIZE))
        for prompt, new, priority, arrives, abandoned in jobs
    ]
    for step in range(2000):
        for arrives, abandoned, sequence in arriving:
            if arrives == step:
                scheduler.add(sequence)
            if abandoned == step and sequence in list(scheduler):
                scheduler.remove(sequence)
        was_idle = scheduler.is_idle
        plan = engine.step(*(fates[step] if step < len(fates) else (1.0, True)))
        assert plan.chunks or was_idle, "sequences are there, but none of them moves"
        assert sum(chunk.num_tokens for chunk in plan.chunks) <= max_step_tokens
        if step > 20 and scheduler.is_idle:
            break
    assert scheduler.is_idle, "the jobs do not come to an end"
    assert scheduler.pool.num_free == NUM_BLOCKS


def run_alone(engine: PaperEngine, sequence: Sequence) -> int:
    """How many of its tokens were computed."""
    before = engine.num_computed
    engine.scheduler.add(sequence)
    while not engine.scheduler.is_idle:
        engine.step()
    return engine.num_computed - before


@pytest.fixture
def make(make_sequence: MakeSequence) -> MakeSequence:
    return lambda ids, new=1, **more: make_sequence(ids, max_new_tokens=new, block_size=BLOCK_SIZE, **more)


def test_what_was_read_before_is_not_read_again_but_for_a_token(make: MakeSequence) -> None:
    engine = PaperEngine.of()
    prompt = list(range(16))
    assert run_alone(engine, make(prompt)) == 16
    assert run_alone(engine, make(prompt)) == 4, "all that is full was there, but something has to be computed"
    assert run_alone(engine, make([*prompt, 1])) == 1
    assert run_alone(engine, make([*prompt[:9], 90])) == 2
    assert run_alone(engine, make([90, *prompt[1:]])) == 16


def test_a_conversation_goes_on_from_what_was_generated(make: MakeSequence) -> None:
    engine = PaperEngine.of()
    first = make(list(range(6)), new=9)
    assert run_alone(engine, first) == 14
    # The last token that was generated is computed by nobody.
    assert run_alone(engine, make([*tokens_of(first), 70, 71])) == 17 - 12


@pytest.mark.holds("docs/design.md#decisions", "A sequence that would read what another is just reading waits for it")
def test_eight_questions_that_come_together_read_their_beginning_once(make: MakeSequence) -> None:
    engine = PaperEngine.of(max_step_tokens=8)
    questions = [make([*range(17), number], new=2) for number in range(90, 98)]
    for question in questions:
        engine.scheduler.add(question)
    while not engine.scheduler.is_idle:
        engine.step()
    # Each computes what is its own, two tokens of the prompt and one that it wrote.
    assert engine.num_computed == 16 + 8 * 3
    assert engine.num_preempted == 0


def test_others_go_on_where_the_one_they_wait_for_is_cancelled(make: MakeSequence) -> None:
    engine = PaperEngine.of(max_step_tokens=8)
    ahead, waits = make([*range(17), 90]), make([*range(17), 91])
    engine.scheduler.add(ahead)
    engine.scheduler.add(waits)
    engine.step()
    assert engine.scheduler.waiting == [waits]
    engine.scheduler.remove(ahead)
    engine.step()
    assert engine.scheduler.running == [waits]


def test_who_shares_nothing_is_not_held_up_by_those_who_wait(make: MakeSequence) -> None:
    engine = PaperEngine.of(max_step_tokens=20)
    ahead, waits, other = make([*range(17), 90]), make([*range(17), 91]), make([80])
    for sequence in (ahead, waits, other):
        engine.scheduler.add(sequence)
    assert list(engine.step().admitted) == [ahead, other]


def test_nobody_waits_for_one_that_goes_after_it(make: MakeSequence) -> None:
    engine = PaperEngine.of(max_step_tokens=8)
    low, high = make([*range(12), 90], priority=6), make([*range(12), 91])
    engine.scheduler.add(low)
    engine.step()
    engine.scheduler.add(high)
    engine.scheduler.limits = StepLimits(max_step_tokens=24)
    assert list(engine.step().admitted) == [high]


def test_who_goes_first_is_waited_for_though_another_has_begun_the_same(make: MakeSequence) -> None:
    engine = PaperEngine.of(max_step_tokens=8)
    low, *high = (make([*range(8), priority], priority=priority) for priority in (6, 0, 0))
    engine.scheduler.add(low)
    engine.step()
    for sequence in high:
        engine.scheduler.add(sequence)
    engine.scheduler.limits = StepLimits(max_step_tokens=32)
    assert list(engine.step().admitted) == high[:1]


def test_where_no_place_is_free_nothing_is_looked_up_in_a_step(
    make: MakeSequence, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = PaperEngine.of(max_running=1)
    engine.scheduler.add(make([0, 1], new=3))
    engine.scheduler.add(make([1] * 12))
    engine.step()
    monkeypatch.delattr(BlockPool, "find")
    assert not engine.step().admitted


def test_a_preempted_sequence_finds_what_is_left_of_its_blocks(make: MakeSequence) -> None:
    engine = PaperEngine.of()
    old, young = make([0] * 20, new=8), make([1] * 16, new=8)
    engine.scheduler.add(old)
    engine.scheduler.add(young)
    engine.step()
    engine.scheduler.limits = StepLimits(max_running=1)
    assert engine.step().preempted == [young]
    engine.scheduler.limits = StepLimits()
    before = engine.num_computed
    assert list(engine.step().admitted) == [young]
    assert engine.num_computed - before == 1 + 1, "one token of each"


@pytest.mark.holds(
    "docs/answers.md#what-is-shared-between-jobs",
    "What the model has read stays in its KV cache until the room is needed",
    "What a running job needs is never kept from it.",
)
def test_what_is_kept_costs_no_running_job_its_blocks(make: MakeSequence) -> None:
    engine = PaperEngine.of()
    for number in range(4):
        run_alone(engine, make([number] * 12))
    assert engine.scheduler.pool.num_free == NUM_BLOCKS
    run_alone(engine, make([9] * 25, new=23))
    assert engine.num_preempted == 0


def test_the_least_recently_held_is_let_go_of_first_and_a_beginning_last(make: MakeSequence) -> None:
    engine = PaperEngine.of()
    first, second = [0] * 21, [1] * 21
    run_alone(engine, make(first))
    run_alone(engine, make(second))
    run_alone(engine, make([2] * 8))
    # Twelve blocks, of which these filled 5, 5 and 2: what is new takes two from the end of what was asked first.
    run_alone(engine, make([3] * 8))
    assert run_alone(engine, make(second)) == 1, "for which it took another one"
    assert run_alone(engine, make(first)) == 21 - 2 * BLOCK_SIZE


def test_what_led_to_numbers_that_are_not_finite_is_found_by_nobody_and_wiped(make: MakeSequence) -> None:
    engine = PaperEngine.of()
    prompt = list(range(14))
    engine.scheduler.add(make(prompt))
    engine.step(is_finite=False)
    assert engine.slots
    assert run_alone(engine, make(prompt)) == 14
    proven = {slot for slot, tokens in engine.slots.items() if len(tokens) <= 12}
    engine.scheduler.add(make([*prompt, 5]))
    engine.step(is_finite=False)
    engine.step()
    assert set(engine.slots) == proven, "what was shared is left as it is, all else is gone"
    assert run_alone(engine, make(prompt)) == 2


def test_a_sequence_cancelled_in_its_prompt_leaves_nothing_unproven(make: MakeSequence) -> None:
    engine = PaperEngine.of(max_step_tokens=8)
    sequence = make(list(range(20)))
    engine.scheduler.add(sequence)
    engine.step()
    engine.scheduler.remove(sequence)
    engine.step()
    assert not engine.slots


@pytest.mark.holds("docs/design.md#decisions", "A full block of the KV cache is known by a chain of digests")
@pytest.mark.parametrize("is_other", [{}, {"ids": 1}, {"places": 1}, {"salt": b"another's"}])
def test_a_key_says_all_that_keys_and_values_follow_from(
    make_prompt: Callable[[list[int]], PreparedPrompt], is_other: dict[str, Any]
) -> None:
    prompt = make_prompt([5, 6, 7, 8, 9, 10, 11, 12])
    other = replace(
        prompt,
        input_ids=prompt.input_ids + is_other.get("ids", 0),
        position_ids=prompt.position_ids + is_other.get("places", 0),
        salt=is_other.get("salt", b""),
    )
    ours, theirs = (set(BlockKeys(each, [], BLOCK_SIZE).keys) for each in (prompt, other))
    assert len(ours) == len(theirs) == 2
    assert ours & theirs == (set() if is_other else ours)


def test_what_is_generated_has_the_keys_of_a_prompt_that_says_it(
    make_prompt: Callable[[list[int]], PreparedPrompt],
) -> None:
    """Behind media positions are not columns."""
    ids = list(range(30))
    places = torch.arange(30).expand(3, -1) - 2 * (torch.arange(30) >= 6)
    longer = replace(make_prompt(ids), position_ids=places, rope_delta=-2)
    prompt = replace(longer, input_ids=longer.input_ids[:10], position_ids=longer.position_ids[:, :10])
    keys = BlockKeys(prompt, [], BLOCK_SIZE)
    for num_blocks in (3, 4, 7):
        keys.extend(ids[10:], num_blocks)
    assert keys.keys == BlockKeys(longer, [], BLOCK_SIZE).keys
