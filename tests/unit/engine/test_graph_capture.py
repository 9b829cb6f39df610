"""What recorded decoding steps are fed, and that a whole engine of them writes what an engine without them writes."""

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import WeakSet

import numpy as np
import pytest
import torch
from torch import Tensor

from keye.worker.engine.graph_capture import CudaRecorder, DecodeGraphs, Replay
from keye.worker.engine.inbox import SamplingOptions
from keye.worker.engine.sequence import Sequence
from keye.worker.engine.step_loop import Engine
from keye.worker.engine.step_plan import StepLimits
from keye.worker.host_fault import HostFault
from keye.worker.model.image_processing import Image
from keye.worker.model.load import load_model
from keye.worker.model.paged_attention import GatheredForm
from keye.worker.model.processor import KeyeProcessor
from tests.support.conditions import eventually

MakeSequence = Callable[..., Sequence]
CHECKPOINT = Path(__file__).parents[2] / "golden" / "preview" / "checkpoint"
SCRATCH = 99


def keep_calling(run: Replay) -> Replay:
    """Stands for a recording where there is no CUDA: what is called again reads the same buffers again."""
    run()
    return run


@pytest.fixture
def fed() -> list[list[list[Any]]]:
    return []


@pytest.fixture
def graphs(fed: list[list[list[Any]]]) -> DecodeGraphs:
    def forward(token_ids: Tensor, positions: Tensor, lengths: Tensor, block_tables: Tensor) -> Tensor:
        fed.append([x.tolist() for x in (token_ids, positions, lengths, block_tables)])
        return torch.nn.functional.one_hot(token_ids.long(), 10).float()

    graphs = DecodeGraphs(forward, [2, 4], SCRATCH, torch.device("cpu"), record=keep_calling)
    graphs.capture(max_running=6)
    fed.clear()
    return graphs


@pytest.fixture
def make_decoding(make_sequence: MakeSequence) -> Callable[[int, list[int]], Sequence]:
    def make(token_id: int, block_table: list[int]) -> Sequence:
        sequence = make_sequence([1] * 5)
        sequence.generated_ids, sequence.block_table, sequence.num_cached = [token_id], block_table, 5
        sequence.pending.prompt = replace(sequence.pending.prompt, rope_delta=-2)
        return sequence

    return make


def test_step_takes_the_smallest_graph_and_fills_it_up_with_nobodys_rows(
    graphs: DecodeGraphs, fed: list[list[list[Any]]], make_decoding: Callable[[int, list[int]], Sequence]
) -> None:
    logits = graphs.run([make_decoding(7, [3]), make_decoding(4, [8, 5]), make_decoding(2, [1])])
    assert logits is not None
    assert logits.argmax(dim=1).tolist() == [7, 4, 2]
    tables = [[3, SCRATCH], [8, 5], [1, SCRATCH], [SCRATCH, SCRATCH]]
    assert fed == [[[7, 4, 2, 0], [3, 3, 3, 0], [6, 6, 6, 1], tables]]


def test_smaller_step_leaves_nothing_of_a_larger_one(
    graphs: DecodeGraphs, fed: list[list[list[Any]]], make_decoding: Callable[[int, list[int]], Sequence]
) -> None:
    graphs.run([make_decoding(n, [n, n, n, n]) for n in range(4)])
    graphs.run([make_decoding(n, [n, n, n]) for n in range(3)])
    assert fed[1][2] == [6, 6, 6, 1]
    assert fed[1][3] == [*([n, n, n, SCRATCH] for n in range(3)), [SCRATCH] * 4]


@pytest.mark.parametrize(("num", "num_blocks"), [(9, 1), (1, 5)], ids=["too-many", "too-long"])
def test_step_that_no_graph_fits_runs_without(
    graphs: DecodeGraphs, make_decoding: Callable[[int, list[int]], Sequence], num: int, num_blocks: int
) -> None:
    assert graphs.run([make_decoding(1, [0] * num_blocks) for _ in range(num)]) is None


def test_engine_writes_the_same_with_and_without_recorded_steps(make_prompt: Callable[[list[int]], Any]) -> None:
    processor = KeyeProcessor.from_checkpoint(CHECKPOINT)
    prompts = [make_prompt(list(range(10, 20 + 30 * n))) for n in range(5)]
    options = SamplingOptions(24)
    written = []
    replays: list[int] = []

    def record(run: Replay) -> Replay:
        def replay() -> Tensor:
            logits = run()
            replays.append(len(logits))
            return logits

        return replay

    for is_recorded in (False, True):
        model = load_model(CHECKPOINT, dtype=torch.float32)
        engine = Engine(model, processor, kv_cache_bytes=2**24, limits=StepLimits(max_running=4))
        runner = engine._runner
        if is_recorded:
            runner._graphs = DecodeGraphs(
                runner._decode, [4, 16], runner._cache.scratch_block, model.device, record=record
            )
            with torch.inference_mode():
                runner._graphs.capture(max_running=4)
        pendings = [engine.inbox.submit(prompt, options) for prompt in prompts]
        engine.start()
        for pending in pendings:
            list(pending.deltas())
        engine.stop()
        written.append([pending.generated.token_ids for pending in pendings])
    assert written[0] == written[1]
    assert 4 in replays


class FaultyRecorder:
    """Records as `keep_calling` does, until it meets the fault."""

    def __init__(self, num_good: int, error: Exception) -> None:
        self._num_left, self._error = num_good, error
        self.replayed = False

    def __call__(self, run: Replay) -> Replay:
        if not self._num_left:
            raise self._error
        self._num_left -= 1

        def replay() -> Tensor:
            self.replayed = True
            return run()

        return replay


@pytest.fixture
def start_capturing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Engine]]:
    """An engine whose attention can be captured, by this recorder."""
    model, processor = load_model(CHECKPOINT, dtype=torch.float32), KeyeProcessor.from_checkpoint(CHECKPOINT)
    engines: WeakSet[Engine] = WeakSet()

    def start(recorder: FaultyRecorder, max_step_tokens: int = 2048) -> Engine:
        monkeypatch.setattr(GatheredForm, "table_widths", (64, 128))
        monkeypatch.setattr("keye.worker.engine.graph_capture.CudaRecorder", lambda: recorder)
        limits = StepLimits(max_running=4, max_step_tokens=max_step_tokens)
        engine = Engine(model, processor, kv_cache_bytes=2**24, limits=limits)
        engines.add(engine)
        engine.start()
        return engine

    yield start
    for engine in engines:
        engine.stop()


def test_fault_of_capturing_leaves_every_step_uncaptured_and_the_engine_alive(
    start_capturing: Callable[..., Engine],
    make_prompt: Callable[[list[int]], Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    fault = torch.AcceleratorError("CUDA error: operation failed due to a previous error during capture")
    recorder = FaultyRecorder(3, fault)
    engine = start_capturing(recorder)
    pending = engine.inbox.submit(make_prompt([10, 11, 12]), SamplingOptions(8))
    list(pending.deltas())
    assert len(pending.generated.token_ids) == 8
    assert not recorder.replayed
    assert "decoding steps run uncaptured" in caplog.text


def test_device_lost_while_capturing_ends_the_engine(start_capturing: Callable[..., Engine]) -> None:
    fault = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    engine = start_capturing(FaultyRecorder(3, fault))
    with pytest.raises(HostFault, match="the engine died of AcceleratorError"):
        engine.warm_up()
    assert not engine.is_alive


def test_all_steps_are_tried_and_recorded_on_one_stream_beside_the_usual_one(monkeypatch: pytest.MonkeyPatch) -> None:
    usual, current, used = object(), [], []

    class Stream:
        def wait_stream(self, other: object) -> None:
            pass

    @contextmanager
    def on(stream: object) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    cuda = SimpleNamespace(
        Stream=Stream,
        CUDAGraph=lambda: SimpleNamespace(replay=lambda: None),
        graph_pool_handle=object,
        current_stream=Stream,
        stream=on,
        graph=lambda graph, pool, stream, capture_error_mode: on(stream),
    )
    for name, pretended in vars(cuda).items():
        monkeypatch.setattr(torch.cuda, name, pretended)
    current.append(usual)
    record = CudaRecorder()
    for number in range(3):
        record(lambda number=number: used.append(current[-1]) or torch.tensor(number))
    assert len(used) == 6
    assert len(set(used)) == 1
    assert usual not in used


def tensors_alive() -> set[int]:
    return {id(thing) for thing in gc.get_objects() if type(thing) is Tensor}


def test_stopped_engine_leaves_nothing_on_the_device(
    start_capturing: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By counts of references alone: the next model may be loaded long before a collection happens to run."""
    processor = KeyeProcessor.from_checkpoint(CHECKPOINT)
    content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    grey = Image(np.full((56, 112, 3), 99, np.uint8))
    text = processor.prepare([{"role": "user", "content": "What is this?"}])
    picture = processor.prepare([{"role": "user", "content": content}], images=[grey])
    recorder = FaultyRecorder(999, RuntimeError("never met"))
    is_reading, may_go_on = threading.Event(), threading.Event()
    start_capturing(recorder).warm_up()  # The angles of rotations are computed once in a process.
    gc.collect()
    gc.disable()
    try:
        before, recorder.replayed = tensors_alive(), False
        engine = start_capturing(recorder, max_step_tokens=20)
        written = engine.inbox.submit(text, SamplingOptions(500, temperature=1, repetition_penalty=1.1, seed=1))
        eventually(lambda: recorder.replayed)

        def read_a_part(chunks: Any, run: Any = engine._runner.run) -> Tensor:
            """Of the prompt with the picture, and no more."""
            if len(chunks) > 1:
                is_reading.set()
                may_go_on.wait()
            return run(chunks)

        monkeypatch.setattr(engine._runner, "run", read_a_part)
        read = engine.inbox.submit(picture, SamplingOptions(500))
        assert is_reading.wait(30)
        engine._is_stopping = True
        may_go_on.set()
        engine.stop()
        assert written.generated.finish_reason == read.generated.finish_reason == "abandoned"
        assert not tensors_alive() - before
        monkeypatch.undo()
        del read_a_part
        last = weakref.ref(engine)
        del engine
        assert last() is None
    finally:
        gc.enable()
