"""The bound on the pixels of all jobs, where the system itself gives no memory."""

import os
import resource

import pytest

from keye.worker.media.decode.pixel_budget import PixelBudget


def test_memory_that_could_not_be_had_does_not_count() -> None:
    budget = PixelBudget(max_bytes=4096)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with budget.share() as unlucky:
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
        try:
            with pytest.raises(OSError, match="Too many open files"):
                budget.allocate(unlucky, 4096)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    with budget.share() as next_job:
        allocated = budget.allocate(next_job, 4096)
    assert allocated is not None
    os.close(allocated[1])
