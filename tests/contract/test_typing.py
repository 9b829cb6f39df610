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
from pathlib import Path
from keye import AnalysisJob, Client, ImagePart, JobFailed
from keye.producer import GenerationOptions, JobResult, Priority

version: str = keye.__version__

def ask(client: Client, photo: bytes) -> JobResult:
    try:
        with open("cat.png", "rb") as file:
            client.submit(media=file, prompt="?")
        client.submit(AnalysisJob(prompt="?", media=(ImagePart(uri="/cat.png"),)))
        client.submit(media="/cat.png", messages=[{"role": "user", "content": "?"}], thinking="think")
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
"""
MISTAKES = """
from keye import Client, ImagePart
Client(7)
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
