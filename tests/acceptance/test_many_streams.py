"""The ten lines of README.md under 500 browsers at once: a real uvicorn, a real worker that echoes."""

import asyncio
import signal
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from httpx2 import AsyncClient as HttpClient
from httpx2 import Limits

from keye.producer import Client
from tests.acceptance.conftest import ECHO, Serve, Start, Started
from tests.support.pages import printed

NUM_JOBS, READERS_OF_EACH = 50, 10


@pytest.fixture
def readme_app(serve: Serve, tmp_path: Path) -> tuple[Started, str]:
    (program,) = printed("README.md", "Stream the answer to a browser")
    assert len([line for line in program.splitlines() if line]) == 10
    (tmp_path / "app.py").write_text(program)
    return serve(tmp_path)


@asynccontextmanager
async def browsers(url: str) -> AsyncIterator[HttpClient]:
    async with HttpClient(base_url=url, timeout=120, limits=Limits(max_connections=None)) as http:
        yield http


class Reader:
    def __init__(self, job_id: str) -> None:
        self.job_id = job_id
        self.text = ""

    async def read(self, http: HttpClient) -> None:
        async with http.sse(f"/jobs/{self.job_id}/events") as stream:
            async for each in stream:
                self.text += each.json().get("text", "")


async def until_all_read(readers: Iterable[Reader], text: str) -> None:
    async with asyncio.timeout(120):
        while not all(reader.text == text for reader in readers):
            await asyncio.sleep(0.05)


def megabytes(server: Started) -> float:
    """The most that the process has ever held."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


@pytest.mark.holds(
    "README.md#stream-the-answer-to-a-browser",
    "app, keye = FastAPI(), AsyncClient()",
    "`uvicorn app:app --timeout-graceful-shutdown 3` runs it",
)
def test_500_streams_all_get_their_text_and_others_are_answered_beside_them(
    readme_app: tuple[Started, str], start: Start, client: Client, tmp_path: Path
) -> None:
    server, url = readme_app
    start(*ECHO, KEYE_CONCURRENCY=str(NUM_JOBS)).wait_until_ready()
    end = tmp_path / "over"
    jobs = [client.submit(prompt=f"write {end}") for _ in range(NUM_JOBS)]
    readers = [Reader(job.id) for job in jobs for _ in range(READERS_OF_EACH)]

    async def play() -> str:
        async with browsers(url) as http, asyncio.TaskGroup() as group:
            for reader in readers:
                group.create_task(reader.read(http))
            await until_all_read(readers, "write")
            asked = await http.post("/jobs", params={"question": "Who else?", "photo": "cat.jpg"})
            end.touch()
            return asked.json()

    asked = asyncio.run(play())
    assert {reader.text for reader in readers} == {f"write {end}"}
    assert client.find(asked)
    assert megabytes(server) < 300


def test_a_server_ends_beside_500_open_streams(readme_app: tuple[Started, str], client: Client) -> None:
    server, url = readme_app
    jobs = [client.submit(prompt="Who answers?") for _ in range(NUM_JOBS * READERS_OF_EACH)]

    async def play() -> int:
        async with browsers(url) as http:
            opened = [http.stream("GET", f"/jobs/{job.id}/events") for job in jobs]
            assert {(await each.__aenter__()).status_code for each in opened} == {200}
            server.ask_to_end()
            return await asyncio.to_thread(server.exit_code, 60)

    assert asyncio.run(play()) == -signal.SIGTERM
