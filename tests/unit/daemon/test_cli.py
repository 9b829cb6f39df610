"""The commands as their words are read."""

from pathlib import Path

from typer.testing import CliRunner

from keye.worker.daemon.cli import app
from keye.worker.daemon.exit_codes import ExitCode

CHECKPOINT = Path(__file__).resolve().parents[2] / "golden" / "preview" / "checkpoint"


def test_plan_names_every_file_that_is_missing(tmp_path: Path) -> None:
    files = [str(tmp_path / name) for name in ("one.png", "two.mp4")]
    answer = CliRunner().invoke(app, ["plan", *files], env={"KEYE_MODEL_PATH": str(CHECKPOINT)})
    assert answer.exit_code == ExitCode.PREFLIGHT_FAILED
    assert f"no such file: {files[0]}, {files[1]}" in answer.stderr
