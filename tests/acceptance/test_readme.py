"""What README.md has a newcomer do, and the page it leads to for a worker to keep, done as it is printed."""

import math
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from redis import Redis
from safetensors import safe_open

from keye.config.job import AnalysisJob, ImagePart, VideoPart
from keye.config.presence import WorkerState, list_present
from tests.acceptance.conftest import ECHO, Start
from tests.support.checkout import PYTHONPATH, ROOT
from tests.support.conditions import eventually
from tests.support.pages import printed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As a checkout, for what is named in it."""
    (tmp_path / "worker").symlink_to(ROOT / "worker")
    return tmp_path


@pytest.fixture
def shell(folder: Path) -> dict[str, str]:
    """The environment of a terminal there, the virtual one active."""
    own = {f"KEYE_{name}_FOLDER": str(folder / name.lower()) for name in ("CACHE", "SPOOL", "RUN")}
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    return os.environ | own | {"PATH": path, "PYTHONPATH": PYTHONPATH, "KEYE_DEVICE": "cpu"}


@pytest.mark.holds("README.md#see-it-work", "To ask such a worker things yourself")
@pytest.mark.holds(
    "docs/test-without-a-gpu.md#and-with-a-real-worker",
    "To keep such a worker and ask it things yourself",
    "python -m keye.worker.demo.embedded_valkey",
)
def test_who_keeps_a_worker_is_answered(folder: Path, shell: dict[str, str]) -> None:
    (block,) = printed("docs/test-without-a-gpu.md", "And with a real worker?", "")
    lines = [line.partition("  #")[0] for line in block.splitlines()]
    broker, export, run, draw, ask = filter(None, lines)
    pipe, bash = subprocess.PIPE, shutil.which("bash")
    assert bash is not None
    with subprocess.Popen(
        [bash, "-c", f"exec {broker}"], cwd=folder, env=shell, stdin=pipe, stdout=pipe, text=True
    ) as served:
        assert served.stdin is not None
        assert served.stdout is not None
        found = re.search(r"redis://\S+", served.stdout.readline())
        assert found is not None
        before = export.replace("redis://:...@...", found[0])
        command = f"{before}; {run.replace('keye-worker run', 'exec keye-worker run')}"
        with (folder / "log").open("wb") as log, Redis.from_url(found[0], decode_responses=True) as redis:
            worker = subprocess.Popen([bash, "-c", command], cwd=folder, env=shell, stdout=log, stderr=log)
            try:
                eventually(lambda: [p.state for p in list_present(redis)] == [WorkerState.READY], within_seconds=150)
                asked = subprocess.run(
                    [bash, "-ec", f"{before}; {draw}; {ask}"], cwd=folder, env=shell, capture_output=True, text=True
                )
            finally:
                worker.terminate()
                worker.wait(60)
        served.stdin.close()
        assert served.wait(30) == 0
    assert asked.returncode == 0, asked.stderr
    assert re.search(r"circle|square|triangle|star|cross|ring|shape", asked.stdout), asked.stdout


@pytest.mark.holds("README.md#ask-a-question", 'with Client("redis://127.0.0.1:6379/0") as client')
def test_the_first_program_prints_the_failure_as_it_says(
    start: Start, redis_url: str, s3_endpoint: str, s3_credentials: None, capsys: pytest.CaptureFixture[str]
) -> None:
    start(*ECHO, KEYE_S3_ENDPOINT_URL=s3_endpoint).wait_until_ready()
    (program,) = printed("README.md", "Ask a question")
    exec(program.replace("redis://127.0.0.1:6379/0", redis_url), {})
    assert capsys.readouterr().out.startswith("MEDIA_NOT_FOUND s3://receipts/2026/0042.jpg: ")


@pytest.mark.holds("README.md#ask-a-question", "it brings redis, pydantic and what a command line needs, but no torch")
def test_the_base_install_is_light() -> None:
    needed = [Requirement(line) for line in requires("keye-worker") or []]
    base = {requirement.name for requirement in needed if requirement.marker is None}
    assert {"redis", "pydantic"} <= base
    assert not base & {"torch", "transformers", "celery", "numpy", "boto3"}


@pytest.mark.holds("README.md#ask-a-question", "A job carries images and videos in any order")
def test_a_job_carries_all_that() -> None:
    parts = [VideoPart(uri="s3://a/b.mp4"), ImagePart(uri="/a.jpg"), VideoPart(uri="/c.mov")]
    rest = {
        "generation": {"temperature": 0.5, "top_p": 0.9, "seed": 7},
        "thinking": "think",
        "priority": "high",
        "deadline_seconds": 60,
        "idempotency_key": "a",
        "metadata": {"order": 7},
    }
    assert AnalysisJob(prompt="?", media=parts, **rest).media == tuple(parts)
    chat = [{"role": "user", "content": [*parts, {"type": "text", "text": "?"}]}, {"role": "assistant", "content": "!"}]
    assert AnalysisJob(messages=[*chat, {"role": "user", "content": "And?"}], **rest)
    with pytest.raises(ValueError, match="prompt"):
        AnalysisJob(prompt="?", messages=chat)


@pytest.mark.holds(
    "README.md#see-it-work", "The demo's worker runs a small Keye-VL (same architecture, same files, 1.5 million"
)
def test_the_small_model_is_as_small_as_that() -> None:
    folder = ROOT / "worker/demo/checkpoint"
    with safe_open(folder / "model.safetensors", "numpy") as weights:
        num_parameters = sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    assert round(num_parameters / 1e6, 1) == 1.5
