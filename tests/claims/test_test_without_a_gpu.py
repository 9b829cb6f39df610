"""docs/test-without-a-gpu.md: a test that plays the worker."""

import pytest

from keye import ErrorCode, JobFailed, JobNotFound, QueueFull, TextGenerated
from keye.testing import MemoryClient


@pytest.mark.holds("docs/producers.md#from-asyncio", "For tests of your own there is a client without Redis")
@pytest.mark.holds(
    "docs/test-without-a-gpu.md#how-do-i-test-what-happens-meanwhile",
    "Without a reply, or where it returns None, a job waits for the test",
    "`MemoryClient(max_queue_depth=1)` refuses the second job that waits as `QueueFull`.",
)
@pytest.mark.parametrize("reply", [None, lambda job: None], ids=["no reply", "None"])
def test_a_test_plays_the_worker_step_by_step(reply: None) -> None:
    client = MemoryClient(reply, max_queue_depth=1)
    job = client.submit(prompt="?", media=["s3://clips/1.mp4"])
    assert job.state == "QUEUED"
    with pytest.raises(QueueFull):
        client.submit(prompt="?")

    client.start(job)
    client.decode(job, 3, 8)
    client.write(job, "Once upon")
    assert (job.state, job.progress.frames_done, job.progress.num_tokens) == ("RUNNING", 3, 2)
    client.lose(job)
    assert job.state == "QUEUED"
    client.start(job)
    client.fail(job, ErrorCode.MEDIA_CORRUPT)
    with pytest.raises(JobFailed, match="MEDIA_CORRUPT"):
        job.result()

    other = client.submit(prompt="?")
    for channel in ("analysis", "reasoning"):
        client.write(other, f"my {channel}", channel=channel)
    client.answer(other, "a cat")
    result = other.result()
    assert (result.analysis, result.reasoning, result.answer) == ("my analysis", "my reasoning", "a cat")
    assert [e.channel for e in other.events() if isinstance(e, TextGenerated)] == ["analysis", "reasoning", "answer"]
    client.forget(other)
    with pytest.raises(JobNotFound):
        other.result()
