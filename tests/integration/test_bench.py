"""`keye-worker bench` on the smallest checkpoint there is; what its figures are depends on the machine."""

import gc
import json
import re
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from keye.config.settings import Settings
from keye.worker.daemon import bench, feeding
from keye.worker.daemon.bench import Disagreement, run_bench
from keye.worker.daemon.cli import app
from keye.worker.engine.model_runner import ModelRunner
from keye.worker.loading.served_model import LoadedModel, load_configured_model

quiet = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # what torchao, where installed, says to others
CHECKPOINT = Path(__file__).parents[1] / "golden" / "preview" / "checkpoint"
SETTINGS = Settings(model_path=CHECKPOINT, device="cpu")
torch.set_num_threads(1)  # The model is tiny; threads that wait for each other only slow it down.


@pytest.fixture(autouse=True)
def _few_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "NUM_RUNNING", (2, 4))
    monkeypatch.setattr(feeding, "PHOTO_SIZE", (400, 300))
    monkeypatch.setattr(feeding, "CLIP_SIZE", (320, 240))
    monkeypatch.setattr(feeding, "CLIP_SECONDS", 1)


def cells(lines: Iterable[str]) -> dict[str, list[str]]:
    """Rows of all tables by their first cell."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    return {name: others for name, *others in rows}


@quiet
@pytest.mark.holds(
    "docs/operations.md#the-cpu-is-busy-and-the-gpu-is-not-why", "It tells first how much memory it takes"
)
def test_bench_prints_a_row_for_each_way_and_each_stage() -> None:
    told: list[str] = []
    lines = list(run_bench(SETTINGS, 4, told.append))
    assert lines[0] == "checkpoint in float32 on cpu"
    assert "engine and `generate` say the same, 4 of 4 tokens alike\n" in lines
    rows = cells(lines)
    ways = ["`generate`, eager attention", "`generate`, batches of 8", "engine, 2 jobs", "engine, 4 jobs"]
    assert {"write a token", bench.PLAIN, *ways} <= rows.keys()
    for name in (bench.PLAIN, *ways):
        seconds, spread, speed, ratio, decoding, _ = rows[name]
        # Printed to the millisecond: on a quick machine half of one is more than a tenth.
        assert float(seconds) == pytest.approx(1 / float(speed), rel=0.1, abs=0.0006)
        fastest, slowest = spread.split(" - ")
        assert float(fastest) <= float(seconds) <= float(slowest)
        assert float(ratio) == pytest.approx(float(speed) / float(rows[bench.PLAIN][2]), rel=0.1)
        assert 0 < int(decoding.rstrip("%")) < 100
    assert rows["reported elsewhere, not measured here: A100 40 GB, default"] == ["1.2", "", "0.83", "", "", "28 GB"]
    memory, duration, *progress = told
    assert re.fullmatch(r"It takes .* GiB of weights in float32 and up to 2\.0 GiB .*, on the CPU\.", memory)
    assert re.fullmatch(r"An answer takes .* s, all measures \d+ to \d+ minutes\. Ctrl-C ends it\.", duration)
    assert [line.split(": ")[0] for line in progress] == [f"{place} of 8" for place in range(1, 9)]
    assert (progress[0], progress[4]) == (f"1 of 8: {bench.PLAIN}", "5 of 8: engine, 4 jobs")
    measured = {line.facts["measured"]: line.facts for line in lines if isinstance(line, bench.Measured)}
    assert {"write a token", bench.PLAIN, *ways, bench.IN_8_BITS, "photos, 400x300"} <= measured.keys()
    assert measured[bench.PLAIN]["images_per_second"] == float(rows[bench.PLAIN][2])
    assert json.loads(json.dumps(measured)) == measured


@quiet
def test_bench_tells_each_row_before_it_measures_the_next_and_goes_on_after_one_that_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    began: list[str] = []

    def measure(model: Any, prompts: Any, new_tokens: int, *, attention: str = "sdpa") -> bench.Row:
        began.append(attention)
        if attention == "eager":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nMore of it")
        return bench.Row([0.5, 1.0, 4.0], 0.9, None)

    monkeypatch.setattr(bench, "measure_generate", measure)
    lines = run_bench(SETTINGS.model_copy(update={"max_image_pixels": 100_000}), new_tokens=2)
    assert next(line for line in lines if bench.PLAIN in line) == (
        f"| {bench.PLAIN} | 1.000 | 0.500 - 4.000 | 1.00 | 1.00 | 90% |  |"
    )
    assert began == ["sdpa"]
    rows = cells(lines)
    assert rows["`generate`, eager attention"][0] == (
        "not measured: OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB."
    )
    assert rows["engine, 4 jobs"][3]
    assert rows["photos, 400x300"][0].startswith("not measured: Fault: ")
    assert float(rows["clips, 320x240, 1 s"][0])


@quiet
def test_bench_loads_smaller_weights_only_once_the_larger_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """By counts of references alone: memory of the device must not wait for a collection."""
    loaded: list[weakref.ref[Any]] = []
    alive: list[bool] = []

    def load(settings: Settings) -> LoadedModel:
        alive.append(any(model() is not None for model in loaded))
        result = load_configured_model(settings.model_copy(update={"precision": "float32"}))
        loaded.append(weakref.ref(result.model))
        return result

    monkeypatch.setattr("keye.worker.loading.served_model.load_configured_model", load)
    gc.disable()
    try:
        rows = cells(run_bench(SETTINGS, new_tokens=2))
    finally:
        gc.enable()
    assert alive == [False, False]
    assert rows[bench.IN_8_BITS][3]


@pytest.mark.holds("docs/operations.md#the-cpu-is-busy-and-the-gpu-is-not-why", "`keye-worker bench` says before the")
def test_bench_says_whether_decoders_feed_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """One decoder, and an engine that has room for all jobs at once: it waits for most of the time."""
    monkeypatch.setattr(feeding, "PHOTO_SIZE", (4000, 3000))
    settings = SETTINGS.model_copy(update={"decoders": 1})
    lines = list(run_bench(settings, new_tokens=2))
    rows = cells(lines)
    for kind in ("photos, 4000x3000", "clips, 320x240, 1 s"):
        feeds, takes, together, waited, would_do = rows[kind]
        assert float(together) > 0
        # Printed to the hundredth.
        assert int(would_do) == pytest.approx(float(takes) / float(feeds), abs=1.2)
        assert re.fullmatch(r"\d+\.\d of \d+\.\d s( \(.*\))?", waited)
    cause = re.search(r"\(decode (.*)\)", rows["photos, 4000x3000"][3])
    assert cause is not None
    assert float(cause[1]) > 0
    assert "1 decoders (KEYE_DECODERS)" in lines[-2]
    assert "share the cores" in lines[-1]


def test_bench_compares_no_speeds_where_one_side_says_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: ModelRunner, chunks: Any) -> Tensor:
        return -right(self, chunks)

    right = ModelRunner.run
    monkeypatch.setattr(ModelRunner, "run", wrong)
    with pytest.raises(Disagreement, match="at token 1 of 2"):
        list(run_bench(SETTINGS, new_tokens=2))


def test_who_stops_a_measure_does_not_wait_for_what_is_left_of_it() -> None:
    asked: list[int] = []
    is_over = threading.Event()

    def answer(number: int) -> None:
        asked.append(number)
        if number == 0:
            raise KeyboardInterrupt
        is_over.wait(60)

    with pytest.raises(KeyboardInterrupt):
        bench.each_in_a_thread(answer, range(100), 2)
    is_over.set()
    assert len(asked) < 10


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_bench_prints_what_it_measures_and_tells_the_rest_apart(
    options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(settings: Settings, tell: Callable[[str], object]) -> Iterator[str]:
        tell("1 of 1: it")
        yield "in words"
        yield "| | s |"
        yield bench.Measured("| it | 1 |", measured="it", seconds=1)

    monkeypatch.setattr(bench, "run_bench", measure)
    told = CliRunner().invoke(app, ["bench", *options])
    printed = '{"measured": "it", "seconds": 1}\n' if options else "in words\n| | s |\n| it | 1 |\n"
    assert (told.exit_code, told.stdout, told.stderr) == (0, printed, "1 of 1: it\n")
    assert bench.Measured("| it | 1 |", measured="it", seconds_per_image=1).in_words() == "it: seconds per image 1"


def test_bench_without_a_checkpoint_says_what_to_set() -> None:
    with pytest.raises(ValueError, match="Set it to a Keye-VL checkpoint folder"):
        next(run_bench(Settings(model_path=None)))
