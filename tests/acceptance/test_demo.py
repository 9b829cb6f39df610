"""The first thing a new user runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.holds("docs/test-without-a-gpu.md#and-with-a-real-worker", "`keye-worker demo` answers without a GPU")
@pytest.mark.holds("README.md#see-it-work", "make demo # sets up .venv", "`demo.png` shows them")
@pytest.mark.holds("docs/design.md#decisions", "Without a server or a GPU, `make demo` starts an embedded Valkey")
def test_demo_answers_every_job_as_expected_and_saves_a_picture(tmp_path: Path) -> None:
    environ = os.environ | {"COLUMNS": "200"}
    command = [sys.executable, "-m", "keye.worker.daemon.cli", "demo"]
    demo = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=100)
    assert demo.returncode == 0, demo.stdout + demo.stderr
    assert "9 of 9 ended as expected" in demo.stdout
    with Image.open(tmp_path / "demo.png") as picture:
        assert picture.width > 800
