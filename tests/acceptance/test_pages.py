"""The code that pages of docs/ print, all of it, run as it is printed: a real server, and a worker that echoes."""

import asyncio
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from httpx2 import Client as HttpClient
from redis import Redis

from keye.config import keys
from keye.producer import AsyncClient, Client, FeedGap, JobFailure, JobResult
from tests.acceptance.conftest import ECHO, PICTURE, Serve, Start
from tests.support.pages import printed

STREAM = "docs/stream-to-a-browser.md"


def run(*blocks: str, **names: Any) -> dict[str, Any]:
    """The names after blocks that stand below each other, run with these before."""
    exec("\n\n".join(blocks), names)
    return names


@pytest.fixture
def uris(tmp_path: Path) -> list[str]:
    """A picture, one that is not there, and what is no medium."""
    (tmp_path / "red.png").write_bytes(PICTURE)
    return [str(tmp_path / "red.png"), str(tmp_path / "lost.png"), "notes"]


@pytest.mark.holds(
    "docs/stream-to-a-browser.md#what-does-the-backend-do",
    "from fastapi.sse import EventSourceResponse",
    "The job is found by a dependency",
    "`after` goes on behind it",
)
def test_the_backend_streams_answers_and_goes_on_behind_an_event(
    serve: Serve, client: Client, start: Start, tmp_path: Path
) -> None:
    start(*ECHO).wait_until_ready()
    program, _ = printed(STREAM)
    (tmp_path / "app.py").write_text(program)
    _, url = serve(tmp_path)
    with HttpClient(base_url=url, timeout=60) as http:
        asked = http.post("/jobs", data={"question": "What is it?", "photo": "cat.jpg"})
        assert client.find(asked.json())
        job = client.submit(prompt="hello")
        with http.sse(f"/jobs/{job.id}/events") as stream:
            seen = list(stream)
        assert [each.json()["text"] for each in seen if each.json()["type"] == "text"] == ["hello"]
        with http.sse(f"/jobs/{job.id}/events", headers={"Last-Event-ID": seen[-2].id}) as stream:
            assert list(stream) == seen[-1:]
        assert http.get("/jobs/7/events").status_code == 404


@pytest.mark.holds(
    "docs/stream-to-a-browser.md#and-without-fastapi",
    "Whatever streams an asynchronous generator will do.",
    "from keye import Heartbeat",
)
def test_lines_for_any_response_hold_each_event_and_break_the_silence(
    redis_url: str, client: Client, start: Start
) -> None:
    _, block = printed(STREAM)
    lines = run(block)["lines"]
    hasty_lines = run(block.replace("heartbeat_seconds=15", "heartbeat_seconds=0.1"))["lines"]
    job_id = client.submit(prompt="hello").id

    async def first_line() -> str:
        async with AsyncClient(redis_url) as keye:
            return await anext(hasty_lines(await keye.find(job_id)))

    async def all_lines() -> list[str]:
        async with AsyncClient(redis_url) as keye:
            return [line async for line in lines(await keye.find(job_id))]

    assert asyncio.run(first_line()) == ": still here\n\n"
    start(*ECHO)
    told = asyncio.run(all_lines())
    assert '"text":"hello"' in "".join(told)
    assert all(line.startswith("id: ") and line.endswith("\n\n") for line in told)
    assert '"type":"ended"' in told[-1]


@pytest.mark.holds("docs/collect-many-results.md#from-asyncio", "async def answers(uris)")
@pytest.mark.holds(
    "docs/collect-many-results.md#in-the-order-of-my-list-and-without-holding-all-of-it", "for uri, end in zip(uris"
)
@pytest.mark.holds(
    "docs/collect-many-results.md#how-do-i-collect-many-results", "from keye import Client, JobFailure, JobResult"
)
def test_many_results_are_collected_as_they_end_in_their_order_and_from_asyncio(
    start: Start,
    redis_url: str,
    uris: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KEYE_REDIS_URL", redis_url)
    start(*ECHO).wait_until_ready()
    as_they_end, in_order, from_asyncio = printed("docs/collect-many-results.md")
    run(as_they_end, uris=uris)
    told = sorted(line.partition(" ")[2] for line in capsys.readouterr().out.splitlines())
    assert [line.partition(" ")[0] for line in told] == ["1", "MEDIA_NOT_FOUND", "What"]
    run(as_they_end.partition("\n")[0], in_order, uris=uris)
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"{uris[0]} What is shown?"
    assert "MEDIA_NOT_FOUND" in told[1]
    assert told[2].startswith("notes 1 fault: ")

    async def collect() -> list[Any]:
        return [end async for _, end in run(from_asyncio)["answers"](uris)]

    assert {type(end).__name__ for end in asyncio.run(collect())} == {"JobResult", "JobFailure", "InvalidJob"}


@pytest.mark.holds(
    "docs/keep-my-own-table.md#and-if-it-was-away-for-too-long",
    "Where some of what came after your place is gone",
    "def catch_up(client)",
)
@pytest.mark.holds(
    "docs/keep-my-own-table.md#how-do-i-keep-the-state-of-jobs-in-a-table-of-my-own",
    "With each row it writes where it stands in the feed",
    "import sqlite3",
)
def test_a_table_of_my_own_is_right_after_kills_and_gaps(
    start: Start, client: Client, redis: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = printed("docs/keep-my-own-table.md")
    assert len(blocks) == 2
    start(*ECHO).wait_until_ready()
    page = run(*blocks)
    with closing(page["db"]) as db:
        answered = client.submit(prompt="hello")
        failed = client.submit(prompt="What?", media=[tmp_path / "lost.png"])
        page["remember"](answered)
        assert {type(end) for _, end in client.results([answered, failed])} == {JobResult, JobFailure}
        page["follow"](client, timeout=0)
        page["remember"](failed)

        def rows() -> dict[str, list[str | None]]:
            return {job_id: rest for job_id, *rest in db.execute("select * from jobs")}

        written = {answered.id: ["SUCCEEDED", "hello", None], failed.id: ["FAILED", None, "MEDIA_NOT_FOUND"]}
        assert rows() == written

        # Killed before it could write down where it was.
        with db:
            db.execute("update feed set place = '0'")
        page["follow"](client, timeout=0)
        assert rows() == written

        missed, waiting = client.submit(prompt="missed"), client.submit(prompt="wait 600")
        for job in (missed, waiting):
            page["remember"](job)
        missed.result(timeout=60)
        client.submit(prompt="newer").result(timeout=60)
        redis.xtrim(keys.ENDED, maxlen=1, approximate=False)
        with pytest.raises(FeedGap):
            page["follow"](client, timeout=0)
        page["catch_up"](client)
        page["follow"](client, timeout=0)
        written |= {missed.id: ["SUCCEEDED", "missed", None], waiting.id: ["QUEUED", None, None]}
        assert written.items() <= rows().items()
    waiting.cancel()


@pytest.mark.holds(
    "docs/producers.md#from-python",
    "from keye import Client, GenerationOptions, JobFailed, VideoPart",
    "Keep `job.id` and ask later",
)
@pytest.mark.holds("docs/producers.md#while-it-runs", "from keye import TextGenerated for event in job.events()")
@pytest.mark.holds(
    "docs/producers.md#many-jobs", "for job, end in client.results(client.submit_many(jobs)): # as they end"
)
@pytest.mark.holds("docs/producers.md#from-asyncio", "async with AsyncClient(")
def test_programs_of_the_producers_page_run(
    start: Start,
    client: Client,
    redis_url: str,
    uris: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    start(*ECHO, KEYE_S3_BUCKETS="none-of-these").wait_until_ready()
    blocks = printed("docs/producers.md")
    at_home = [block.replace("redis://127.0.0.1:6379/0", redis_url) for block in blocks]
    asked, chat, follow, many, from_asyncio = at_home
    names = run(asked)
    assert capsys.readouterr().out.startswith("MEDIA_FORBIDDEN ")
    found = client.find(names["job"].id)
    assert (found.state, [type(event).__name__ for event in found.events()][-1]) == ("FAILED", "JobEnded")
    run(follow, job=client.submit(prompt="hello"))
    assert capsys.readouterr().out == "hello"

    imports = "from keye import *\nfrom pathlib import Path\nimport numpy as np"
    jobs = [{"prompt": "one"}, {"prompt": "?", "media": ["/nowhere.png"]}, {"prompt": ""}]
    run(imports, many, client=client, jobs=jobs, paths=uris[:2])
    told = sorted(line.partition(" ")[2].partition(" ")[0] for line in capsys.readouterr().out.splitlines())
    assert told == ["1", "MEDIA_FORBIDDEN", "one"]
    Path("monday.jpg").write_bytes(PICTURE)
    run(imports, chat, client=client, frame=np.zeros((28, 28, 3), np.uint8))

    indented = from_asyncio.replace("\n", "\n    ")
    program = f"import asyncio\nasync def main():\n    {indented}\nasyncio.run(main())"
    run(imports, program, photo=uris[0])
    assert capsys.readouterr().out == "What is in the picture?\n"


@pytest.mark.holds("docs/test-without-a-gpu.md#and-with-asyncio", "import asyncio from keye import AsyncClient")
@pytest.mark.holds("docs/test-without-a-gpu.md#how-do-i-test-what-happens-meanwhile", "from keye import TextGenerated")
@pytest.mark.holds(
    "docs/test-without-a-gpu.md#how-do-i-test-my-code-without-a-gpu",
    "With `keye.testing.MemoryClient`",
    "from keye import ErrorCode, JobFailed",
)
def test_tests_without_a_gpu_pass_without_redis_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEYE_REDIS_URL", "redis://nowhere.invalid:1/0")
    (tmp_path / "test_mine.py").write_text("\n\n".join(printed("docs/test-without-a-gpu.md")))
    command = [sys.executable, "-m", "pytest", "-q", "-c", "/dev/null", "test_mine.py"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert "3 passed" in ran.stdout, ran.stdout
