"""docs/scaling.md: that its tables follow from its own figures, and what media take."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
from redis import Redis

from keye.config import keys
from keye.config.job import Priority
from keye.config.topology import message_list
from keye.producer import Client, ImagePart

PAGE = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()


def rows(first: str) -> list[list[str]]:
    """Of the table with this in its head, cell by cell."""
    lines = PAGE.splitlines()
    (head,) = (number for number, line in enumerate(lines) if line.startswith(f"| {first} |"))
    end = next(number for number in range(head, len(lines)) if not lines[number].startswith("|"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[head + 2 : end]]


def number(text: str) -> float:
    return float(re.findall(r"[\d.,]*\d", text)[0].replace(",", ""))


@pytest.mark.holds(
    "docs/scaling.md#how-many-gpus-that-is",
    "jobs/s of a GPU | a job writes for | Redis' thread a job",
    "results are kept for | jobs/s on one Redis",
    "So past 18 jobs/s lower",
)
@pytest.mark.holds("docs/scaling.md#what-a-job-takes", "An answer that is written for 10 s adds 100 events")
def test_the_tables_follow_from_what_a_job_takes() -> None:
    thread_ms = number(rows("of")[0][1])
    event_ms, event_kb = map(float, re.findall(r"an event each tenth of a second, (\S+) ms .* and (\S+) KB", PAGE)[0])
    most, planned = 1000 / thread_ms, 500 / thread_ms
    assert [most, planned] == pytest.approx([3300, 1600], rel=0.05)
    assert "3,300 jobs/s; plan for half, 1,600" in PAGE
    assert [100 * event_ms, 100 * event_kb] == pytest.approx([3, 17])
    for rate, writes_for, job_ms, gpus in rows("jobs/s of a GPU"):
        told = number(job_ms)
        assert told == pytest.approx(thread_ms + 10 * number(writes_for) * event_ms, rel=0.02)
        assert number(gpus) == pytest.approx(500 / told / number(rate), rel=0.03)
    kept = rows("results are kept for")
    result_kb, seconds = number(rows("of")[4][1]), {"a day (the default)": 86400, "an hour": 3600, "ten minutes": 600}
    for period, told in kept:
        by_memory = 16e6 / result_kb / seconds[period]
        assert number(told) == pytest.approx(min(by_memory, planned), rel=0.05)
    assert all(number(one[1]) < number(other[1]) for one, other in pairwise(kept))


@pytest.mark.holds("docs/scaling.md#when-one-is-not-enough", "A `data:` picture of 1 MB takes 1.4 MB of Redis")
def test_a_picture_inside_its_job_takes_more_than_twice_itself_while_it_waits(client: Client, redis: Redis) -> None:
    job = client.submit(prompt="?", media=[ImagePart(uri=f"data:image/png;base64,{'A' * (4 * 2**20 // 3 // 4 * 4)}")])
    kept = redis.memory_usage(keys.record(job.id), samples=0)
    waiting = redis.memory_usage(message_list(Priority.NORMAL), samples=0)
    assert kept == pytest.approx(1.4e6, rel=0.1)
    assert 2 * kept < kept + waiting < 3 * kept


@pytest.mark.holds("docs/scaling.md#what-a-job-takes", "Redis' memory while it waits | 2.5 KB")
def test_a_waiting_job_takes_what_the_page_says(client: Client, redis: Redis) -> None:
    jobs = client.submit_many([{"prompt": "What is in the picture?", "media": ["s3://photos/cat.jpg"]}] * 1000)
    before = [redis.memory_usage(keys.record(job.id), samples=0) for job in jobs]
    lists = [message_list(Priority.NORMAL), keys.queued("normal")]
    taken = sum(before) + sum(redis.memory_usage(name, samples=0) for name in lists)
    assert taken / len(jobs) == pytest.approx(2500, rel=0.25)
