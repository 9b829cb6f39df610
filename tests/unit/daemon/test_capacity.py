"""What `keye-worker plan` says of room for tokens and jobs is so, and what it says to lower helps."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from benchmarks.synthetic_keye import make_processor, real_size
from keye.worker.daemon.capacity import Capacity
from keye.worker.daemon.cli import app
from keye.worker.daemon.exit_codes import ExitCode
from keye.worker.daemon.findings import Severity
from keye.worker.daemon.trials import check_gpu_memory
from keye.worker.engine.memory import measure_cache_bytes, row_bytes
from keye.worker.engine.model_memory import CUDA_BYTES, ModelMemory
from keye.worker.engine.step_loop import DEFAULT_LIMITS, Engine
from keye.worker.model.configuration_keye import KeyeConfig
from keye.worker.model.load import load_model
from keye.worker.model.processor import KeyeProcessor
from tests.support.pages import printed
from tests.support.zoo import draw_quarters, encode_clip, steady_times

PREVIEW = Path(__file__).parents[2] / "golden" / "preview" / "checkpoint"
GIB = 2**30


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The 8B model's sizes, media of up to 1280 tokens each, and no weights."""
    folder = tmp_path / "Keye-VL-8B"
    shutil.copytree(PREVIEW, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    KeyeConfig().save_pretrained(folder)
    media = json.loads((folder / "preprocessor_config.json").read_text()) | {"max_pixels": 1280 * 28 * 28}
    (folder / "preprocessor_config.json").write_text(json.dumps(media))
    monkeypatch.setenv("KEYE_MODEL_PATH", str(folder))
    return folder


def plan(*arguments: object) -> dict[str, Any]:
    answer = CliRunner().invoke(app, ["plan", "--json", *map(str, arguments)], catch_exceptions=False)
    assert answer.exit_code == 0, answer.output
    return dict(json.loads(answer.stdout))


@pytest.mark.holds("docs/operations.md#it-does-not-start-why", "the model fits into its memory")
def test_the_doctor_reckons_as_the_plan_does(checkpoint: Path) -> None:
    finding = check_gpu_memory(Capacity.of(checkpoint, "auto", 24 * GIB, 0.9))
    assert finding.severity is Severity.OK
    assert (
        f"21.6 of 24.0 GiB: room for {plan('--gpu-memory', '24GiB')['memory']['cache_tokens']:,} tokens"
        in finding.found
    )
    finding = check_gpu_memory(Capacity.of(checkpoint, "auto", 24 * GIB, 0.5))
    assert finding.severity is Severity.FAULT
    assert "12.0 of 24.0 GiB may be taken (KEYE_GPU_MEMORY_FRACTION)" in finding.found
    assert check_gpu_memory(Capacity.of(checkpoint, "int4", 24 * GIB, 0.5)).severity is Severity.OK


@pytest.mark.holds(
    "docs/operations.md#how-many-jobs-does-a-gpu-hold-and-what-must-i-lower",
    "for the 8B sizes on an H100 the two agree to a percent",
)
def test_an_h100_is_planned_as_one_was_measured() -> None:
    """Its log: GPU memory: 17.0 of 79.2 GiB taken, 1.8 GiB for the largest step or video, 52.4 GiB for keys and values;
    room for 381696 tokens.
    """
    memory = ModelMemory.of(make_processor(real_size()), "bfloat16", DEFAULT_LIMITS)
    capacity = Capacity(memory, card=int(79.2 * GIB), fraction=0.9)
    told = capacity.as_dict()
    assert (memory.weights + CUDA_BYTES) / GIB == pytest.approx(17.0, rel=0.02)
    # It kept no encoded media yet, which are planned for now.
    assert (told["reserve_bytes"] - row_bytes(told["cache_bytes"])) / GIB == pytest.approx(1.8, rel=0.05)
    assert told["cache_bytes"] / GIB == pytest.approx(52.4, rel=0.01)
    assert capacity.num_tokens == pytest.approx(381_696, rel=0.01)


@pytest.mark.holds("docs/alerts.md#keyeoutofmemory", "`keye-worker plan` says what fits")
@pytest.mark.usefixtures("checkpoint")
def test_what_it_says_to_lower_has_so_many_jobs_run_together() -> None:
    shape = ("--gpu-memory", "24GiB", "--visual-tokens", 6000)
    memory = plan(*shape)["memory"]
    assert 20_000 < memory["cache_tokens"] < 30_000
    assert memory["jobs"] == memory["cache_tokens"] // 256 // -(-(6000 + 256 + 1024) // 256)
    fewer, *smaller = memory["lower"]
    found = re.fullmatch(r"8 jobs run together with at most [\d,]+ tokens: ([\d,]+) visual tokens", fewer)
    assert found, fewer
    lowered = int(found[1].replace(",", ""))
    assert plan("--gpu-memory", "24GiB", "--visual-tokens", lowered)["memory"]["jobs"] == 8
    assert plan("--gpu-memory", "24GiB", "--visual-tokens", lowered + 256)["memory"]["jobs"] == 7
    for precision, line in zip(("int8", "int4"), smaller, strict=True):
        other = plan(*shape, "--precision", precision)["memory"]
        room = f"room for {other['cache_tokens']:,} tokens, {other['jobs']} such jobs"
        assert line == f"--precision {precision} has {room}"


@pytest.mark.usefixtures("checkpoint")
def test_a_gpu_without_room_for_one_job_is_told_what_would_have() -> None:
    shape = ("--visual-tokens", 3000, "--max-new-tokens", 2000)
    memory = plan("--gpu-memory", "16 GiB", *shape)["memory"]
    assert (memory["cache_tokens"], memory["jobs"]) == (0, 0)
    quantised, *_, card = memory["lower"]
    assert quantised.startswith("--precision int8 has room for")
    found = re.fullmatch(r"in bfloat16 one such job needs a GPU of ([\d.]+) GiB", card)
    assert found, card
    assert plan("--gpu-memory", f"{float(found[1]) + 0.1:.1f}GiB", *shape)["memory"]["jobs"] >= 1
    assert plan("--gpu-memory", f"{float(found[1]) - 0.1:.1f}GiB", *shape)["memory"]["jobs"] == 0


@pytest.mark.holds(
    "docs/operations.md#how-many-jobs-does-a-gpu-hold-and-what-must-i-lower",
    "for one that you think of buying, without weights and without running anything",
)
@pytest.mark.usefixtures("checkpoint")
def test_files_that_are_shown_at_the_pixels_it_says_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEYE_CONCURRENCY", "64")
    Image.fromarray(draw_quarters(600, 800)).save(tmp_path / "photo.png")
    files = (encode_clip(tmp_path / "clip.mp4", steady_times(90)), tmp_path / "photo.png")
    card = ("--gpu-memory", "22.5GiB", "--max-new-tokens", 32, "--text-tokens", 32)
    planned = plan(*files, *card)
    assert 1 <= planned["memory"]["jobs"] < 64, planned
    found = re.search(r"64 jobs run together .*: --max-pixels (\d+)", planned["memory"]["lower"][0])
    assert found, planned
    lowered = plan(*files, *card, "--max-pixels", found[1])
    assert lowered["memory"]["jobs"] == 64
    assert lowered["visual_tokens"] < planned["visual_tokens"]


@pytest.mark.holds(
    "docs/operations.md#how-many-jobs-does-a-gpu-hold-and-what-must-i-lower",
    "A worker measures the same at its start",
)
def test_on_a_cpu_the_plan_is_what_an_engine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = load_model(PREVIEW, dtype=torch.float32), KeyeProcessor.from_checkpoint(PREVIEW)
    engine = Engine(
        model, processor, kv_cache_bytes=measure_cache_bytes(model, processor, DEFAULT_LIMITS, memory_fraction=0.9)
    )
    pool = engine._scheduler.pool
    monkeypatch.setenv("KEYE_MODEL_PATH", str(PREVIEW))
    monkeypatch.setenv("KEYE_DEVICE", "cpu")
    memory = plan()["memory"]
    assert memory["precision"] == "float32"
    assert memory["cache_tokens"] == pool.num_blocks * pool.block_size


@pytest.mark.usefixtures("checkpoint")
def test_the_table_has_room_jobs_and_what_to_lower() -> None:
    arguments = ["plan", "--gpu-memory", "24GiB", "--visual-tokens", "6000"]
    answer = CliRunner().invoke(app, arguments, env={"COLUMNS": "120"}, catch_exceptions=False)
    assert answer.exit_code == 0, answer.output
    assert re.search(r"weights +│ 16\.1 GiB in bfloat16, and 0\.9 for CUDA itself", answer.output)
    assert re.search(r"this job +│ 7,280 tokens: 6,000 visual, 256 of text, 1,024 of the answer", answer.output)
    assert re.search(r"together +│ 3 such jobs +│", answer.output)
    assert "- --precision int8 has room for" in answer.output


@pytest.mark.usefixtures("checkpoint")
def test_files_and_a_number_of_visual_tokens_exclude_each_other(tmp_path: Path) -> None:
    told = CliRunner().invoke(app, ["plan", str(tmp_path / "a.png"), "--visual-tokens", "9"])
    assert told.exit_code == ExitCode.PREFLIGHT_FAILED
    assert "--visual-tokens 9 is for a job without files" in told.stderr


def test_a_folder_that_is_no_checkpoint_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEYE_MODEL_PATH", str(tmp_path))
    told = CliRunner().invoke(app, ["plan"])
    assert told.exit_code == ExitCode.PREFLIGHT_FAILED
    assert "config.json" in told.stderr


@pytest.mark.usefixtures("checkpoint")
@pytest.mark.holds(
    "docs/operations.md#how-many-jobs-does-a-gpu-hold-and-what-must-i-lower",
    "$ keye-worker plan --visual-tokens 6000 --gpu-memory 24GiB",
)
def test_the_page_prints_what_is_printed() -> None:
    (block,) = printed("docs/operations.md", "How many jobs does a GPU hold, and what must I lower?", language="")
    command, _, shown = block.partition("\n")
    arguments = command.removeprefix("$ keye-worker ").split()
    answer = CliRunner().invoke(app, arguments, env={"COLUMNS": "120"}, catch_exceptions=False)
    assert answer.output.rstrip() == shown.rstrip()
