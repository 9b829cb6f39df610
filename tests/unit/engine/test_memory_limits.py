"""How far a step is held back once memory ran out."""

import pytest

from keye.worker.engine.memory import FIRST_REST, MemoryLimits
from keye.worker.engine.step_plan import StepLimits


def steps_until_raised(limits: MemoryLimits) -> int:
    before, steps = limits.now, 0
    while limits.now == before:
        limits.count_step()
        steps += 1
        assert steps < 100_000, "the limit never rises again"
    return steps


@pytest.mark.holds("docs/design.md#one-job-walked", "steps stay smaller for a thousand steps and more")
def test_limit_rises_again_step_by_step_up_to_what_was_configured() -> None:
    configured = StepLimits(max_running=64, max_step_tokens=2048)
    limits = MemoryLimits(configured)
    limits.lower(600)
    limits.lower(300)
    limits.lower(900)
    assert limits.now == StepLimits(64, 300)
    seen = []
    while limits.now != configured:
        assert steps_until_raised(limits) == FIRST_REST
        seen.append(limits.now.max_step_tokens)
    assert seen == [600, 1200, 2048]


def test_device_that_is_too_small_is_tried_ever_more_rarely() -> None:
    limits = MemoryLimits(StepLimits(max_running=64, max_step_tokens=2048))
    rests = []
    for _ in range(4):
        limits.lower(40)
        assert limits.now == StepLimits(40, 40)
        rests.append(steps_until_raised(limits))
    assert rests == [FIRST_REST, 2 * FIRST_REST, 4 * FIRST_REST, 8 * FIRST_REST]
