"""What a user's mypy says of programs that use the installed package: nothing of sound ones, all mistakes of others."""

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SOUND = """
import keye
import numpy as np
from pathlib import Path
from keye import AnalysisJob, Analyzer, AsyncClient, AsyncJob, Client, ImagePart, JobFailed, TextGenerated
from keye.testing import MemoryClient
from keye.producer import GenerationOptions, JobResult, Priority

version: str = keye.__version__

def ask(client: Client, photo: bytes) -> JobResult:
    try:
        with open("cat.png", "rb") as file:
            client.submit(media=file, prompt="?")
        client.submit(AnalysisJob(prompt="?", media=(ImagePart(uri="/cat.png"),)))
        client.submit(media=np.zeros((4, 4, 3), np.uint8), prompt="?")
        client.submit(media="/cat.png", messages=[{"role": "user", "content": "?"}], thinking="think")
        client.submit(messages=[{"role": "user", "content": ["?", photo, Path("cat.png"), ImagePart(uri="/cat.png")]}])
        client.submit_many([{"prompt": "?"}, AnalysisJob(prompt="?")])[0]
        job = client.submit(
            prompt="?",
            media=["s3://b/cat.png", Path("/a.mp4"), photo, {"type": "image", "uri": "/b"}, ImagePart(uri="/c")],
            generation=GenerationOptions(seed=7),
            priority=Priority.HIGH,
            metadata={"camera": 4},
        )
        return job.result(timeout=60)
    except JobFailed as failed:
        raise SystemExit(failed.failure.message)

async def stream(client: AsyncClient, after: str | None) -> str:
    job: AsyncJob = await client.find("7")
    text = ""
    async for event in job.events(after=after, heartbeat_seconds=15):
        if isinstance(event, TextGenerated):
            text += event.text
    async for each, end in client.results(await client.submit_many([{"prompt": "?"}])):
        answer = end.answer if isinstance(end, JobResult) else end
    place: int | None = (await job.progress).place
    return text + (await job.result()).answer + await job.state

def collect(client: Client) -> list[str]:
    ended = {end.job_id: end.state for end in client.watch(after="0", timeout=0)}
    ends = client.map("?", [Path("a.jpg"), b"..."], priority="low")
    return [end.answer for end in ends if isinstance(end, JobResult)] + list(ended)

def script(photo: bytes) -> list[str]:
    with Analyzer("checkpoint", precision="int8") as analyzer:
        answer: str = analyzer.analyze("cat.png", "?", thinking_mode="think", max_new_tokens=9).answer
        analyzer.video(Path("clip.mp4"), "?", fps=10, max_pixels=360 * 420)
        ends = analyzer.batch([photo, ["a.png", photo], np.zeros((4, 4, 3), np.uint8)], "?")
        written = [event.text for event in analyzer.stream(photo, "?")]
        return [answer, *written, *(end.answer for end in ends if isinstance(end, JobResult))]

def reply(job: AnalysisJob) -> str:
    return "a cat"

answer: str = MemoryClient(reply).submit(prompt="?").result().answer
"""
MISTAKES = """
from keye import AsyncClient, Client, ImagePart
Client(7)
AsyncClient().watch(before="0")
Client().map("?", ["/cat.png"], idempotency_key="k")
Client().submit(promt="?")
Client().submit(prompt=7)
Client().submit(prompt="?", media=[7])
ImagePart(url="/cat.png")
length: int = Client().submit(prompt="?").result().answer
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of an environment that has the package as installed, where only its py.typed makes its types count."""
    folder = tmp_path_factory.mktemp("user")
    venv.create(folder, symlinks=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    (packages / "keye.pth").write_text(f"{ROOT / 'src'}\n{sysconfig.get_path('purelib')}\n")
    return folder / "bin" / "python"


def lines_told(python: Path, program: str) -> tuple[list[int], str]:
    file = python.with_name("program.py")
    file.write_text(program)
    options = ["--strict", "--no-error-summary", "--python-executable", str(python)]
    options += ["--cache-dir", str(ROOT / ".mypy_cache" / "user"), "--config-file", ""]
    output = subprocess.run(
        [sys.executable, "-m", "mypy", *options, file.name], cwd=file.parent, capture_output=True, text=True
    ).stdout
    return [int(line.split(":")[1]) for line in output.splitlines() if ": error: " in line], output


def test_sound_program_is_sound(python: Path) -> None:
    assert lines_told(python, SOUND) == ([], "")


def test_mistakes_are_told_where_they_are(python: Path) -> None:
    lines, output = lines_told(python, MISTAKES)
    assert lines == [number for number, line in enumerate(MISTAKES.splitlines(), 1) if "(" in line], output
    assert '"promt"' in output
