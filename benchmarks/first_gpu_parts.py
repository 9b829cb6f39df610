"""The parts of `first_gpu_run.py`, each a generator of Markdown. Needs torch, transformers, numpy and pillow only."""

import importlib.util
import logging
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from inspect import signature
from itertools import accumulate
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.nn.attention.varlen import varlen_attn
from torch.profiler import ProfilerActivity
from torch.profiler import profile as record

from benchmarks.gpu import benchmark
from benchmarks.synthetic_keye import (
    Size,
    make_model,
    make_processor,
    make_prompt,
    make_video_prompt,
    make_words,
    real_size,
    tiny_size,
)
from keye.config.codes import PrecisionSetting
from keye.config.faults import Fault
from keye.worker.daemon.bench import anew, answer, decode_seconds, measure_engine, wait_for
from keye.worker.engine.inbox import SamplingOptions
from keye.worker.engine.memory import measure_cache_bytes
from keye.worker.engine.model_memory import ModelMemory
from keye.worker.engine.step_loop import Engine
from keye.worker.engine.step_plan import StepLimits
from keye.worker.model.attention_choice import ACCEPTED_STEPS, attend_on_paper
from keye.worker.model.configuration_keye import KeyeConfig
from keye.worker.model.cuda_attention import HAS_BLOCK_TABLES, FlexForm, VarlenForm
from keye.worker.model.device import choose_device, has_packed_kernels, torch_facts
from keye.worker.model.device_faults import is_device_lost
from keye.worker.model.item_attention import EqualItems, VarlenItems
from keye.worker.model.keye import KeyeForConditionalGeneration
from keye.worker.model.load import load_model
from keye.worker.model.paged_attention import AttentionForm, GatheredForm, KVCache, Span, attend_spans
from keye.worker.model.precision import PrecisionUnavailable, choose_precision
from keye.worker.model.processor import KeyeProcessor, PreparedPrompt

Lines = Iterator[str]

ROOT = Path(__file__).parents[1]
SMALL_KEYE = ROOT / "worker" / "demo" / "checkpoint"
PACKAGES = ("torch", "triton", "transformers", "safetensors", "numpy", "pillow", "torchao", "bitsandbytes", "pytest")
TOP_KERNELS = 15
BUSY_THREADS = 8


class Skipped(Exception):
    """Why a part has nothing to run here."""


@dataclass(frozen=True)
class Setting:
    size: Size
    is_tiny: bool
    device: torch.device

    def require_cuda(self) -> None:
        if self.device.type != "cuda":
            raise Skipped("torch can use no CUDA device here")


def run_part(name: str, is_tiny: bool) -> Lines:
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)7.0f ms %(levelname)s %(name)s: %(message)s")
    torch.manual_seed(0)
    yield from _PARTS[name](Setting(tiny_size() if is_tiny else real_size(), is_tiny, choose_device("auto")))


def versions(setting: Setting) -> Lines:
    yield "| | |"
    yield "|---|---|"
    yield f"| machine | {platform.platform()}, {len(os.sched_getaffinity(0))} cores |"
    yield f"| Python | {platform.python_version()} |"
    for package in PACKAGES:
        yield f"| {package} | {_version(package)} |"
    yield f"| CUDA of torch, cuDNN | {torch.version.cuda}, {torch.backends.cudnn.version()} |"
    yield f"| C compiler | {torch_facts().compiler or 'none'} |"
    yield f"| `varlen_attn` | {', '.join(signature(varlen_attn).parameters)} |"
    yield f"| driver | {_command('nvidia-smi', '--query-gpu=name,driver_version,mig.mode.current', '--format=csv')} |"
    yield f"| source | {_command('git', '-C', str(ROOT), 'log', '-1', '--format=%h %s')} |"
    if setting.device.type == "cuda":
        gpu = torch.cuda.get_device_properties(setting.device)
        yield f"| GPU | {gpu.name}, capability {gpu.major}.{gpu.minor}, {gpu.multi_processor_count} multiprocessors |"
        free, total = torch.cuda.mem_get_info(setting.device)
        yield f"| its memory | {_gib(free)} of {_gib(total)} free |"


def split_rows(setting: Setting) -> Lines:
    setting.require_cuda()
    if not HAS_BLOCK_TABLES:
        raise Skipped(f"varlen_attn of torch {torch.__version__} has no block tables")
    yield from compare_splits(varlen_attn, setting.device)


def compare_splits(kernel: Callable[..., Any], device: torch.device) -> Lines:
    """The kernel's rows against attention in float32, for steps of several prompts."""
    accepted = ACCEPTED_STEPS * torch.finfo(torch.bfloat16).eps
    splits: list[dict[str, int | None]] = [{}]
    if "num_splits" in signature(kernel).parameters:
        splits = [{"num_splits": None}, {"num_splits": 1}]
    yield f"8B heads, bfloat16; a row is wrong that is off by more than {accepted:.2g}."
    yield ""
    yield "| (queries, keys) | | rows wrong | of | largest error |"
    yield "|---|---|---|---|---|"
    for step in (((30, 1400), (60, 60)), ((60, 60), (30, 1400)), ((16, 4000), (16, 4000)), ((100, 2000), (1, 1))):
        arguments, options, expected = _paged_prompts(step, device)
        for split in splits:
            try:
                output = kernel(*arguments, **options, **split)
                errors = (output.float().cpu() - expected).abs().amax(dim=(1, 2))
                # Turned round, so that numbers that are none do not pass.
                wrong = int((~(errors <= accepted)).sum())
                found = f"{wrong} | {len(errors)} | {float(errors.max()):.3g}"
            except Exception as error:
                if is_device_lost(error):
                    raise
                found = f"{_told(error)} | |"
            yield f"| {step} | {split or 'no num_splits'} | {found} |"


def _paged_prompts(step: Sequence[tuple[int, int]], device: torch.device) -> tuple[list[Any], dict[str, Any], Tensor]:
    """The arguments of a `varlen_attn` over block tables for (queries, keys) of several sequences, and the outputs to
    come, [queries, heads, head_dim] in float32.
    """
    heads, kv_heads, head_dim = 32, 8, 128
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    num_blocks = [-(-num_keys // VarlenForm.block_size) for _, num_keys in step]
    keys, values = (draw(sum(num_blocks), VarlenForm.block_size, kv_heads, head_dim) for _ in range(2))
    tables = torch.zeros(len(step), max(num_blocks), dtype=torch.int32)
    queries, expected = [], []
    places = torch.randperm(sum(num_blocks), generator=generator).split(num_blocks)
    for row, (blocks, (num_queries, num_keys)) in enumerate(zip(places, step, strict=True)):
        tables[row, : len(blocks)] = blocks
        queries.append(draw(num_queries, heads, head_dim))
        own = (paged[blocks].flatten(0, 1)[:num_keys] for paged in (keys, values))
        expected.append(attend_on_paper(queries[-1], *own, is_causal=True))
    num_queries_of, num_keys_of = zip(*step, strict=True)
    borders = [torch.tensor([0, *accumulate(lengths)], dtype=torch.int32) for lengths in (num_queries_of, num_keys_of)]
    tensors = [tensor.to(device) for tensor in (torch.cat(queries), keys, values, *borders)]
    options = {
        "window_size": (-1, 0),
        "enable_gqa": True,
        "seqused_k": torch.tensor(num_keys_of, dtype=torch.int32, device=device),
        "block_table": tables.to(device),
    }
    return [*tensors, max(num_queries_of), max(num_keys_of)], options, torch.cat(expected)


def gpu_tests(setting: Setting) -> Lines:
    folder = ROOT / "tests" / "gpu"
    if importlib.util.find_spec("pytest") is None or not folder.is_dir():
        raise Skipped(f"pytest is not installed, or there is no {folder}")
    setting.require_cuda()
    command = [sys.executable, "-m", "pytest", "-q", "-rfEs", "--tb=short", "-p", "no:cacheprovider", str(folder)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    yield "```"
    yield from (run.stdout + run.stderr).splitlines()[-150:]
    yield "```"
    if run.returncode:
        raise RuntimeError(f"pytest ended with {run.returncode}")


@torch.inference_mode()
def sequence_forms(setting: Setting) -> Lines:
    config = copy(setting.size.config)
    config.num_hidden_layers = 1
    dtype, context = setting.size.dtype, config.max_position_embeddings
    forms: list[AttentionForm] = [GatheredForm()]
    if has_packed_kernels(setting.device, dtype, config.head_dim):
        forms = [*([VarlenForm(context)] if HAS_BLOCK_TABLES else []), FlexForm(context), *forms]
    steps = [[(1, keys)] * num for num in (1, 8, 64) for keys in (context // 32, context // 5, context * 3 // 4)]
    steps += [[(context // 32, context // 32)] * num for num in (1, 4)] + [[(context // 20, context // 2)]]
    yield "Milliseconds of a layer's attention with what is made once a step: the first call, and later ones."
    yield ""
    yield "| (queries, keys) | form | first | later |"
    yield "|---|---|---|---|"
    for form in forms:
        # One cache for all steps, as an engine has it: a form that is compiled is compiled for its size.
        num_blocks = max(sum(-(-keys // form.block_size) for _, keys in step) for step in steps)
        cache = KVCache(config, num_blocks, form.block_size, dtype, setting.device)
        cache.keys[0].normal_()
        cache.values[0].normal_()
        for step in steps:
            call = partial(_attend_step, form, cache, config, step)
            yield f"| {len(step)} of {step[0]} | {form.name} | {_first_and_later(call, setting.device)} |"
        del cache, call


def _attend_step(
    form: AttentionForm, cache: KVCache, config: KeyeConfig, step: Sequence[tuple[int, int]]
) -> Callable[[], object]:
    num_blocks = [-(-num_keys // form.block_size) for _, num_keys in step]
    blocks = torch.randperm(sum(num_blocks)).split(num_blocks)
    spans = [Span(own.tolist(), *pair) for own, pair in zip(blocks, step, strict=True)]
    num_queries = sum(num for num, _ in step)
    query, key, value = (
        torch.randn(1, heads, num_queries, config.head_dim, dtype=cache.keys[0].dtype, device=cache.device)
        for heads in (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    )
    return lambda: attend_spans(form, cache, spans)(0, query, key, value, config.head_dim**-0.5)


@torch.inference_mode()
def item_forms(setting: Setting) -> Lines:
    vision, dtype, device = setting.size.config.vision_config, setting.size.dtype, setting.device
    heads, head_dim = vision.num_attention_heads, vision.hidden_size // vision.num_attention_heads
    patches = setting.size.grid[0] * setting.size.grid[1]
    shapes = {"an image": [patches], "8 images": [patches] * 8, "8 sizes": [patches // n for n in range(1, 9)]}
    shapes |= {"a video as a whole": [8 * patches], "64 frames": [patches // 4] * 64}
    forms: dict[str, Callable[[list[int]], Callable[..., object]]] = {
        EqualItems.name: lambda lengths: EqualItems().attention(lengths, device)
    }
    if has_packed_kernels(device, dtype, head_dim):
        forms["varlen_attn, a window as wide as the longest"] = lambda lengths: VarlenItems().attention(lengths, device)
        forms["varlen_attn, as torch chooses"] = lambda lengths: _without_window(lengths, device)
    yield f"Milliseconds of a layer's attention in {dtype}: the first call with a shape, and later ones."
    yield ""
    yield "| | patches | form | first | later |"
    yield "|---|---|---|---|---|"
    for name, lengths in shapes.items():
        for form, make in forms.items():

            def call(lengths: list[int] = lengths, make: Any = make) -> Callable[[], object]:
                rows = [torch.randn(sum(lengths), heads, head_dim, dtype=dtype, device=device) for _ in range(3)]
                return partial(make(lengths), *rows)

            yield f"| {name} | {sum(lengths)} | {form} | {_first_and_later(call, device)} |"


def _without_window(lengths: Sequence[int], device: torch.device) -> Callable[..., object]:
    borders = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    return lambda query, key, value: varlen_attn(query, key, value, borders, borders, max(lengths), max(lengths))


def capture(setting: Setting) -> Lines:
    setting.require_cuda()
    written, steps = [], []
    for is_captured in (True, False):
        with _small_engine(setting.device) as (engine, prompts):
            if not is_captured:
                runner: Any = engine._runner
                runner.capture_decoding = lambda max_running: None
            began = time.perf_counter()
            engine.start()
            answer(engine, prompts[0], 2)
            ready_seconds = time.perf_counter() - began
            written.append(_answers(engine, prompts))
            steps.append(1000 * decode_seconds(answer(engine, prompts[0], 64)))
            yield f"{'Captured' if is_captured else 'Uncaptured'}: {_num_graphs(engine)} graphs, ready"
            yield f"after {ready_seconds:.1f} s, {steps[-1]:.2f} ms a step; attention: {engine.attention.name}.\n"
    yield f"{_num_same(*written)} of {len(written[0])} answers are the same (half precision may part some)."


def out_of_memory(setting: Setting) -> Lines:
    setting.require_cuda()
    with _small_engine(setting.device) as (engine, prompts):
        engine.start()
        before = _answers(engine, prompts)
        torch.cuda.empty_cache()
        total = torch.cuda.mem_get_info(setting.device)[1]
        for spare in (2**26, 2**23, 2**20):
            held = torch.cuda.memory_reserved(setting.device)
            torch.cuda.set_per_process_memory_fraction((held + spare) / total)
            outcomes = _outcomes(engine, prompts)
            yield f"- With {_gib(held)} held and {spare / 2**20:g} MiB besides: {', '.join(outcomes)}."
        torch.cuda.set_per_process_memory_fraction(1.0)
        after = _answers(engine, prompts)
        yield f"- With all memory again: {_num_same(before, after)} of {len(before)} answers are as before."
        yield f"- The engine is {'alive' if engine.is_alive else '**dead**'}; its log says what it lowered."


def fault_in_capture(setting: Setting) -> Lines:
    setting.require_cuda()
    with _small_engine(setting.device) as (engine, prompts):
        runner: Any = engine._runner
        decode = runner._decode

        def wait_while_capturing(*inputs: Tensor) -> Tensor:
            logits: Tensor = decode(*inputs)
            if torch.cuda.is_current_stream_capturing():
                torch.cuda.synchronize()
            return logits

        runner._decode = wait_while_capturing
        engine.start()
        outcomes = _outcomes(engine, prompts)
        yield f"{_num_graphs(engine)} graphs are kept; the jobs: {', '.join(outcomes)}."
        if not engine.is_alive:
            raise RuntimeError("the engine died of a fault that belongs to capturing alone")


def memory(setting: Setting) -> Lines:
    size, device = setting.size, setting.device
    model = make_model(size, device)
    at_rest = _allocated(device)
    yield f"- Weights: {_gib(at_rest)}."
    processor = make_processor(size)
    cache_bytes = measure_cache_bytes(model, processor, size.limits, memory_fraction=0.9)
    usable = int(0.9 * (torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else 24 * 2**30))
    planned = _gib(usable) if device.type == "cuda" else "no plan on a CPU"
    yield f"- Planned for all together: {planned}, of it {_gib(cache_bytes)} for keys and values."
    precision: PrecisionSetting = "float32" if size.dtype == torch.float32 else "bfloat16"
    told = ModelMemory.of(processor, precision, size.limits).cache_bytes(usable)
    yield f"- `keye-worker plan` would have said {_gib(told)} for keys and values of {_gib(usable)}."
    engine = Engine(model, processor, kv_cache_bytes=cache_bytes, limits=size.limits)
    engine.start()
    answer(engine, make_prompt(size, 0), size.new_tokens)
    yield f"- The engine has answered: {_gib(_reserved(device))} reserved."
    prompts = [make_prompt(size, seed) for seed in range(2 * max(size.num_running))]
    num = max(size.num_running)
    speed = measure_engine(engine, prompts, size.new_tokens, num, device).images_per_second
    yield f"- {num} jobs with an image each: {speed:.2f} images/s, {_gib(_reserved(device))} reserved."
    yield f"- Steps: {engine.snapshot()}"
    yield ""
    yield "| a video of visual tokens | outcome | s | beyond what lay there |"
    yield "|---|---|---|---|"
    context = size.config.max_position_embeddings
    for tokens in (context // 20, context // 5, context * 2 // 5, context * 4 // 5):
        video = make_video_prompt(size, tokens)
        before = _allocated(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        began = time.perf_counter()
        (outcome,) = _outcomes(engine, [video])
        beyond = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else 0
        seconds = time.perf_counter() - began
        yield f"| {video.num_visual_tokens} | {outcome} | {seconds:.2f} | {_gib(beyond)} |"
    engine.stop()


@torch.inference_mode()
def profile(setting: Setting) -> Lines:
    size, device = setting.size, setting.device
    model, processor = make_model(size, device), make_processor(size)
    image = make_prompt(size, 0)
    assert image.pixel_values is not None
    assert image.image_grid_thw is not None
    patches, grid = image.pixel_values.to(device), image.image_grid_thw
    yield from _profiled("An image through the tower", lambda: model.get_image_features(patches, grid), device)
    cache_bytes = measure_cache_bytes(model, processor, size.limits, memory_fraction=0.8)
    engine = Engine(model, processor, kv_cache_bytes=cache_bytes, limits=size.limits)
    # Its own thread is not started: steps are taken here, one by one.
    engine._runner.capture_decoding(size.limits.max_running)
    words = [make_words(size, seed, image.input_ids.numel()) for seed in range(1 + size.limits.max_running)]
    engine.inbox.submit(words[0], SamplingOptions(1))
    yield from _profiled(f"A prompt of {len(image.input_ids)} words", engine._step, device, num_first=0)
    for num in (1, size.limits.max_running):
        pendings = [engine.inbox.submit(prompt, SamplingOptions(256)) for prompt in words[1 : 1 + num]]
        for _ in range(100):
            engine._step()
            if all(sequence.is_decoding for sequence in engine._scheduler):
                break
        yield from _profiled(f"A step with {engine.snapshot().running} decoding", engine._step, device, num_first=3)
        for pending in pendings:
            pending.abandon()
        engine._step()


def _profiled(name: str, run: Callable[[], object], device: torch.device, num_first: int = 2) -> Lines:
    """The kernels (on a CPU, operations) that took most of one run's time, after `num_first` others."""
    for _ in range(num_first):
        run()
    wait_for(device)
    is_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    with record(activities=activities) as recorded:
        began = time.perf_counter()
        run()
        wait_for(device)
        milliseconds = 1000 * (time.perf_counter() - began)
    device_type, column = (
        (DeviceType.CUDA, "self_device_time_total") if is_cuda else (DeviceType.CPU, "self_cpu_time_total")
    )
    time_of = attrgetter(column)
    rows = [row for row in recorded.key_averages() if row.device_type == device_type and time_of(row)]
    rows.sort(key=time_of, reverse=True)
    total = sum(map(time_of, rows)) or 1
    yield f"\n**{name}**: {milliseconds:.2f} ms while recorded, {total / 1000:.2f} ms of it in {len(rows)} kernels.\n"
    yield "| kernel | calls | ms | % |"
    yield "|---|---|---|---|"
    for row in rows[:TOP_KERNELS]:
        kernel = row.key.replace("|", " ")[:90]
        yield f"| `{kernel}` | {row.count} | {time_of(row) / 1000:.3f} | {100 * time_of(row) / total:.0f} |"


def speed(setting: Setting) -> Lines:
    yield from benchmark(setting.size, setting.device)


def int8(setting: Setting) -> Lines:
    _require("int8", setting.device)
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    yield from _quantised(setting, lambda model: quantize_(model.model.layers, Int8WeightOnlyConfig()))


def int4(setting: Setting) -> Lines:
    _require("int4", setting.device)
    yield from _quantised(setting, _to_nf4)


def _require(precision: Any, device: torch.device) -> None:
    try:
        choose_precision(precision, device)
    except (PrecisionUnavailable, ImportError) as error:
        raise Skipped(str(error)) from error


def _to_nf4(model: KeyeForConditionalGeneration) -> None:
    import bitsandbytes

    for module in list(model.model.layers.modules()):
        for name, linear in list(module.named_children()):
            if isinstance(linear, torch.nn.Linear):
                small = bitsandbytes.nn.Linear4bit(
                    linear.in_features, linear.out_features, False, linear.weight.dtype, quant_type="nf4", device="meta"
                )
                small.weight = bitsandbytes.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
                setattr(module, name, small.to(linear.weight.device))


def _quantised(setting: Setting, shrink: Callable[[KeyeForConditionalGeneration], object]) -> Lines:
    """The engine with weights as they are, then shrunk."""
    size, device = setting.size, setting.device
    prompts = [make_prompt(size, seed) for seed in range(2 * max(size.num_running))]
    model, processor = make_model(size, device), make_processor(size)
    num = max(size.num_running)
    yield f"| weights | memory | decoding step of one job, ms | images/s, {num} jobs |"
    yield "|---|---|---|---|"
    for name in ("as they are", "shrunk"):
        if name == "shrunk":
            shrink(model)
        num_bytes = _allocated(device)
        cache_bytes = measure_cache_bytes(model, processor, size.limits, memory_fraction=0.8)
        engine = Engine(model, processor, kv_cache_bytes=cache_bytes, limits=size.limits)
        engine.start()
        answer(engine, prompts[0], 2)
        alone = 1000 * decode_seconds(answer(engine, prompts[0], size.new_tokens))
        speed = measure_engine(engine, prompts, size.new_tokens, num, device).images_per_second
        yield f"| {name} | {_gib(num_bytes)} | {alone:.2f} | {speed:.2f} |"
        engine.stop()


def busy_threads(setting: Setting) -> Lines:
    size, device = setting.size, setting.device
    seconds = 1.0 if setting.is_tiny else 30.0
    model, processor = make_model(size, device), make_processor(size)
    cache_bytes = measure_cache_bytes(model, processor, size.limits, memory_fraction=0.8)
    engine = Engine(model, processor, kv_cache_bytes=cache_bytes, limits=size.limits)
    engine.start()
    prompts = [make_prompt(size, seed) for seed in range(max(size.num_running))]
    answer(engine, prompts[0], 2)
    yield f"{len(prompts)} jobs at once, {seconds:g} s each; the threads count in Python, which shares one lock.\n"
    yield "| | steps/s | ms a step |"
    yield "|---|---|---|"
    for num_busy in (0, 1, BUSY_THREADS, 0):
        is_over = threading.Event()
        busy = [threading.Thread(target=_count, args=[is_over], daemon=True) for _ in range(num_busy)]
        for thread in busy:
            thread.start()
        with ThreadPoolExecutor(len(prompts)) as jobs:
            running = [jobs.submit(_answer_until, engine, prompt, size.new_tokens, is_over) for prompt in prompts]
            before, began = engine.snapshot(), time.perf_counter()
            is_over.wait(seconds)
            after, measured = engine.snapshot(), time.perf_counter() - began
            is_over.set()
            for job in running:
                job.result()
        steps = after.steps - before.steps
        in_step = f"{1000 * (after.step_seconds - before.step_seconds) / steps:.2f}" if steps else "none ended"
        yield f"| {num_busy} busy threads | {steps / measured:.1f} | {in_step} |"
    engine.stop()


def _count(is_over: threading.Event) -> None:
    number = 0
    while number % 1000 or not is_over.is_set():
        number += 1


def _answer_until(engine: Engine, prompt: PreparedPrompt, new_tokens: int, is_over: threading.Event) -> None:
    while not is_over.is_set():
        answer(engine, prompt, new_tokens)


@contextmanager
def _small_engine(device: torch.device) -> Iterator[tuple[Engine, list[PreparedPrompt]]]:
    """The small trained Keye, not started yet, and prompts of several lengths for it."""
    processor = KeyeProcessor.from_checkpoint(SMALL_KEYE)
    processor.eos_token_ids = ()
    model = load_model(SMALL_KEYE, dtype=torch.bfloat16, device=device)
    engine = Engine(model, processor, kv_cache_bytes=2**27, limits=StepLimits(max_running=8))
    texts = ["What is this? " * num for num in (1, 4, 9, 20, 2, 60, 30, 3)]
    try:
        yield engine, [processor.prepare([{"role": "user", "content": text}]) for text in texts]
    finally:
        if engine._thread.is_alive():
            engine.stop()


def _answers(engine: Engine, prompts: Sequence[PreparedPrompt]) -> list[tuple[int, ...]]:
    """All prompts at once."""
    pendings = [engine.inbox.submit(anew(prompt), SamplingOptions(40)) for prompt in prompts]
    for pending in pendings:
        for _ in pending.deltas():
            pass
    return [pending.generated.token_ids for pending in pendings]


def _outcomes(engine: Engine, prompts: Sequence[PreparedPrompt]) -> list[str]:
    """All prompts at once; a word on each."""
    outcomes = []
    for pending in [engine.inbox.submit(anew(prompt), SamplingOptions(8)) for prompt in prompts]:
        try:
            for _ in pending.deltas():
                pass
            outcomes.append("answered")
        except Fault as fault:
            outcomes.append(f"**{fault.code}**: {fault}")
    return outcomes


def _num_same(ours: Sequence[object], theirs: Sequence[object]) -> int:
    return sum(a == b for a, b in zip(ours, theirs, strict=True))


def _first_and_later(make: Callable[[], Callable[[], object]], device: torch.device) -> str:
    """Milliseconds of the first call and the median of five later ones, as two cells; or what went wrong."""
    try:
        call = make()
        times = []
        for _ in range(7):
            wait_for(device)
            began = time.perf_counter()
            call()
            wait_for(device)
            times.append(1000 * (time.perf_counter() - began))
        return f"{times[0]:.2f} | {statistics.median(times[2:]):.3f}"
    except Exception as error:
        if is_device_lost(error):
            raise
        return f"{_told(error)} |"


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:200]}".replace("\n", " ").replace("|", "/")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _command(*command: str) -> str:
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return _told(error)
    return "; ".join((run.stdout + run.stderr).strip().splitlines())


def _num_graphs(engine: Engine) -> int:
    graphs = engine._runner._graphs
    return 0 if graphs is None else len(graphs._steps)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _reserved(device: torch.device) -> int:
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0


_PARTS = {
    part.__name__: part
    for part in (
        *(versions, split_rows, gpu_tests, sequence_forms, item_forms, capture, out_of_memory, fault_in_capture),
        *(memory, profile, speed, int8, int4, busy_threads),
    )
}
