"""What counts as starvation, and what for; tests/acceptance/test_starvation.py sees it of a real worker."""

import pytest

from keye.worker.engine.snapshot import EngineSnapshot
from keye.worker.tasks.attempt import Phase
from keye.worker.tasks.isolation import MAX_COMPANY
from keye.worker.tasks.starvation import Cause, Starvation

IDLE = EngineSnapshot(max_running=2, max_step_tokens=100, num_blocks=10)


def seen(engine: EngineSnapshot, *phases: Phase) -> set[Cause]:
    """The causes for which a look counts time."""
    starvation = Starvation(lambda: engine, lambda: phases)
    starvation.turn()
    return {cause for cause, seconds in starvation.seconds.items() if seconds}


@pytest.mark.parametrize(
    ("phases", "cause"),
    [
        (["fetch"], "fetch"),
        (["decode"], "decode"),
        # A decoder has something to do, and would have more if the store were quicker.
        (["fetch", "decode"], "fetch"),
        (["fetch", "decoder", "decode"], "decode"),
        (["fetch", "memory", "decode"], "memory"),
        (["memory", "decoder"], "decode"),
        (["fetch", "running"], "fetch"),
        (["company"], "company"),
        (["company", "decode"], "decode"),
    ],
)
@pytest.mark.holds(
    "docs/operations.md#the-cpu-is-busy-and-the-gpu-is-not-why",
    "it waits for | where | what helps",
    "a job waits for a decoder; or jobs are decoded, or their prompts made, and none is fetched or waits",
    "none waits for a decoder, but one for room for its pixels",
    "none waits for either, and one is fetched",
    "all that are left wait for one of the eight places that such jobs have",
)
def test_the_cause_is_the_narrowest_place(phases: list[Phase], cause: Cause) -> None:
    assert seen(IDLE, *phases) == {cause}
    assert MAX_COMPANY == 8


@pytest.mark.holds(
    "docs/operations.md#the-cpu-is-busy-and-the-gpu-is-not-why",
    "Nothing is counted while the engine is full, nor while no job is on its way",
)
@pytest.mark.holds(
    "docs/operations.md#the-cpu-is-busy-and-the-gpu-is-not-why", "`KEYE_CONCURRENCY` is set: it bounds what runs, too"
)
def test_nothing_counts_where_no_job_is_on_its_way() -> None:
    assert not seen(IDLE)
    assert not seen(IDLE, "engine")
    assert not seen(EngineSnapshot(running=1, max_running=2, max_step_tokens=100), "running")


@pytest.mark.parametrize(
    ("engine", "is_starved"),
    [
        (EngineSnapshot(running=1, max_running=2, max_step_tokens=100, num_blocks=10, blocks_used=5), True),
        (EngineSnapshot(running=2, max_running=2, max_step_tokens=100, num_blocks=10, blocks_used=2), False),
        # Another like it takes six blocks, and there are four.
        (EngineSnapshot(running=1, max_running=2, max_step_tokens=100, num_blocks=10, blocks_used=6), False),
        # What waits after a step found no room.
        (EngineSnapshot(waiting=1, max_running=2, max_step_tokens=100, num_blocks=10), False),
        # The next step is full of a prompt that is still being read.
        (EngineSnapshot(running=1, max_running=2, max_step_tokens=100, unread_tokens=100), False),
        (EngineSnapshot(running=1, max_running=2, max_step_tokens=100, unread_tokens=99), True),
    ],
)
def test_an_engine_starves_only_while_it_could_begin_with_another(engine: EngineSnapshot, is_starved: bool) -> None:
    assert bool(seen(engine, "decode")) is is_starved


def test_what_has_just_been_handed_in_takes_its_place() -> None:
    assert seen(IDLE, "engine", "decode") == {"decode"}
    assert not seen(IDLE, "engine", "engine", "decode")
