"""`keye-worker bench` on the smallest checkpoint there is; what its figures are depends on the machine."""

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from keye.config.settings import Settings
from keye.worker.daemon.bench import Disagreement, run_bench
from keye.worker.engine.model_runner import ModelRunner

CHECKPOINT = Path(__file__).parents[1] / "golden" / "preview" / "checkpoint"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # what torchao, where it is installed, says to others
def test_bench_prints_a_row_for_each_way_and_each_stage() -> None:
    lines = list(run_bench(Settings(model_path=CHECKPOINT, device="cpu"), new_tokens=2))
    assert lines[0] == "checkpoint in float32 on cpu"
    assert "engine and `generate` say the same, 2 of 2 tokens alike\n" in lines
    rows = {line.split("|")[1].strip(): line for line in lines if line.startswith("|")}
    assert {"`generate`, fused attention", "engine, 8 jobs", "engine, 64 jobs", "write a token"} <= rows.keys()
    plain = [float(cell) for cell in rows["`generate`, fused attention"].split("|")[2:5]]
    assert plain[0] == pytest.approx(1 / plain[1], rel=0.1)
    assert plain[2] == 1


def test_bench_compares_no_speeds_where_one_side_says_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: ModelRunner, chunks: Any) -> Tensor:
        return -right(self, chunks)

    right = ModelRunner.run
    monkeypatch.setattr(ModelRunner, "run", wrong)
    with pytest.raises(Disagreement, match="at token 1 of 2"):
        list(run_bench(Settings(model_path=CHECKPOINT, device="cpu"), new_tokens=2))


def test_bench_without_a_checkpoint_says_what_to_set() -> None:
    with pytest.raises(ValueError, match="Set it to a Keye-VL checkpoint folder"):
        next(run_bench(Settings(model_path=None)))
