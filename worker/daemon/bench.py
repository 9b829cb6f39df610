"""How fast a machine answers: the engine and plain `generate` on the same prompts, once both answer them alike.

`keye-worker bench` measures the configured checkpoint, `benchmarks/` others; settings are read by the first only.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from keye.worker.engine.inbox import Generated, SamplingOptions
from keye.worker.engine.memory import measure_cache_bytes
from keye.worker.engine.step_loop import DEFAULT_LIMITS, Engine
from keye.worker.engine.step_plan import StepLimits
from keye.worker.model.device import name_device
from keye.worker.model.image_processing import Image
from keye.worker.model.keye import KeyeForConditionalGeneration
from keye.worker.model.precision import PrecisionUnavailable
from keye.worker.model.processor import KeyeProcessor, PreparedPrompt

if TYPE_CHECKING:
    from keye.config.settings import Settings

IMAGE_SIZE = (1120, 896)  # 1,280 visual tokens, where the checkpoint lets an image have as many
NEW_TOKENS = 128
NUM_RUNNING = (8, 32, 64)
CHECK_CACHE_BYTES = 2**30  # for one prompt, of the largest checkpoint at full size

# By the rules of `answer`: nothing that the checkpoint's own options say.
GREEDY: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
GREEDY |= {"repetition_penalty": 1.0, "eos_token_id": None, "pad_token_id": 0}

# Two sums of the same numbers in another order differ by about so many of a precision's smallest steps. In float32
# kernels round too, to what tensor cores multiply.
TIE_STEPS = 4
FINEST_STEP = 2.0**-12


def run_bench(settings: "Settings", new_tokens: int = NEW_TOKENS) -> Iterator[str]:
    """Lines of Markdown, as they come. Raises as `load_configured_model` and `check_agreement` do."""
    # Here, because benchmarks run where there is torch and no pydantic.
    from keye.worker.daemon.loading import load_configured_model

    path, model, processor, precision = load_configured_model(settings)
    device = model.device
    processor.eos_token_ids = ()  # every answer has the same length, whatever it says
    began = time.perf_counter()
    prompt = _prompt(processor)
    prepare_seconds = time.perf_counter() - began
    yield f"{path.name} in {precision.name} on {name_device(device)}"
    yield f"{prompt.num_visual_tokens} visual tokens an image, {new_tokens} new tokens an answer"
    engine = Engine(model, processor, kv_cache_bytes=CHECK_CACHE_BYTES, limits=StepLimits(max_running=1))
    engine.start()
    try:
        num_alike = check_agreement(engine, model, prompt, new_tokens)
    finally:
        engine.stop()
    del engine  # what it keeps would count as memory of `generate`
    yield f"engine and `generate` say the same, {num_alike} of {new_tokens} tokens alike\n"

    rows = measure_plain(model, [prompt] * 16, new_tokens)
    encoding = encode_seconds(model, prompt)
    cache_bytes = measure_cache_bytes(model, processor, DEFAULT_LIMITS, settings.gpu_memory_fraction)
    engine = Engine(model, processor, kv_cache_bytes=cache_bytes)
    engine.start()
    engine.warm_up()
    alone = answer(engine, prompt, new_tokens)
    rows += [measure_engine(engine, [prompt] * (2 * num), new_tokens, num, device) for num in NUM_RUNNING]
    engine.stop()
    # Else the whole model would lie on the GPU beside its own smaller copy.
    del engine, model
    try:
        smaller = load_configured_model(settings.model_copy(update={"precision": "int8"}))
    except PrecisionUnavailable as error:
        yield f"Without a row for 8 bits: {error}\n"
    else:
        rows.insert(2, measure_generate("`generate`, 8-bit weights", smaller.model, [prompt] * 3, new_tokens))
    yield from as_table(rows)

    assert alone.first_token_seconds is not None
    yield "\n| stage of one job alone | ms |"
    yield "|---|---|"
    yield f"| prepare the image, on the CPU | {1000 * prepare_seconds:.1f} |"
    yield f"| encode the image | {1000 * encoding:.1f} |"
    yield f"| read the prompt | {1000 * (alone.first_token_seconds - encoding):.1f} |"
    yield f"| write a token | {1000 * decode_seconds(alone):.2f} |"


@dataclass(frozen=True, slots=True)
class Row:
    """`peak_bytes` is the most memory that torch had allocated meanwhile (None on a CPU)."""

    name: str
    images_per_second: float
    peak_bytes: int | None


class Disagreement(Exception):
    """Engine and `generate` answer the same prompt differently: one is wrong, and their speeds compare nothing."""


def check_agreement(
    engine: Engine, model: KeyeForConditionalGeneration, prompt: PreparedPrompt, new_tokens: int
) -> int:
    """How many tokens engine and `generate` say alike: all, or up to where two are as good as each other to the model.

    Raises `Disagreement` where they part although the model prefers one.
    """
    ours = answer(engine, prompt, new_tokens).token_ids
    output = _generate(model, [prompt], new_tokens, return_dict_in_generate=True, output_logits=True)
    theirs = output.sequences[0, -new_tokens:].tolist()
    for place, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        if our == their:
            continue
        logits = output.logits[place][0].float()
        step = max(torch.finfo(model.dtype).eps, FINEST_STEP)
        # Turned round, so that numbers that are none do not pass for a tie.
        if not logits[their] - logits[our] <= TIE_STEPS * step * logits.abs().max():
            raise Disagreement(
                f"the engine's answer parts from that of `generate` at token {place + 1} of {new_tokens}: {our} where "
                f"the model prefers {their} by {logits[their] - logits[our]:.3g}. Their speeds cannot be compared"
            )
        return place
    return new_tokens


def measure_plain(model: KeyeForConditionalGeneration, prompts: Sequence[PreparedPrompt], new_tokens: int) -> list[Row]:
    """The rows of `generate` at the model's own precision: eager attention, fused attention, batches of 8."""
    return [
        measure_generate("`generate`, eager attention", model, prompts[:3], new_tokens, attention="eager"),
        measure_generate("`generate`, fused attention", model, prompts[:3], new_tokens),
        measure_generate("`generate`, batches of 8", model, prompts[:16], new_tokens, batch_size=8),
    ]


def measure_generate(
    name: str,
    model: KeyeForConditionalGeneration,
    prompts: Sequence[PreparedPrompt],
    new_tokens: int,
    *,
    batch_size: int = 1,
    attention: str = "sdpa",
) -> Row:
    """The plain approach: `generate` on one batch after the other. Prompts must be of equal length."""
    model.set_attn_implementation(attention)
    batches = [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)]

    def run() -> None:
        for batch in batches:
            _generate(model, batch, new_tokens)

    _generate(model, batches[0], 2)  # first calls load kernels
    return _measured(name, run, len(prompts), model.device)


def measure_engine(
    engine: Engine, prompts: Sequence[PreparedPrompt], new_tokens: int, num_running: int, device: torch.device
) -> Row:
    """As many threads as jobs run at once, each handing in its next job when its last has ended."""

    def run() -> None:
        with ThreadPoolExecutor(num_running) as threads:
            list(threads.map(lambda prompt: answer(engine, prompt, new_tokens), prompts))

    return _measured(f"engine, {num_running} jobs", run, len(prompts), device)


def answer(engine: Engine, prompt: PreparedPrompt, new_tokens: int) -> Generated:
    """One greedy generation. An engine whose processor has no end tokens writes exactly `new_tokens`."""
    pending = engine.inbox.submit(prompt, SamplingOptions(new_tokens))
    for _ in pending.deltas():
        pass
    return pending.generated


def decode_seconds(generated: Generated) -> float:
    """Seconds a step, of a generation that ran alone."""
    assert generated.first_token_seconds is not None
    decoding = generated.queued_seconds + generated.generate_seconds - generated.first_token_seconds
    return decoding / (len(generated.token_ids) - 1)


@torch.inference_mode()
def encode_seconds(model: KeyeForConditionalGeneration, prompt: PreparedPrompt) -> float:
    """Of the prompt's images, through tower and projector, the second time: first calls load kernels."""
    assert prompt.pixel_values is not None
    assert prompt.image_grid_thw is not None
    for _ in range(2):
        wait_for(model.device)
        began = time.perf_counter()
        model.get_image_features(prompt.pixel_values.to(model.device), prompt.image_grid_thw)
        wait_for(model.device)
    return time.perf_counter() - began


def as_table(rows: Sequence[Row]) -> Iterator[str]:
    """Lines of a Markdown table; the ratio is to the second row, half precision one image at a time."""
    plain = rows[1].images_per_second
    yield "| | s/image | images/s | ratio | memory |"
    yield "|---|---|---|---|---|"
    for row in rows:
        memory = "" if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.1f} GiB"
        speed = row.images_per_second
        yield f"| {row.name} | {1 / speed:.3f} | {speed:.2f} | {speed / plain:.2f} | {memory} |"


def _measured(name: str, run: Callable[[], None], num_images: int, device: torch.device) -> Row:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    wait_for(device)
    began = time.perf_counter()
    run()
    wait_for(device)
    seconds = time.perf_counter() - began
    peak_bytes = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return Row(name, num_images / seconds, peak_bytes)


def _prompt(processor: KeyeProcessor) -> PreparedPrompt:
    noise = np.random.default_rng(0).integers(0, 256, (*IMAGE_SIZE, 3), np.uint8)
    content = [{"type": "image"}, {"type": "text", "text": "Describe this image."}]
    return processor.prepare([{"role": "user", "content": content}], images=[Image(noise)])


def _generate(
    model: KeyeForConditionalGeneration, prompts: Sequence[PreparedPrompt], new_tokens: int, **options: bool
) -> Any:
    """Greedy, exactly `new_tokens`; of prompts of equal length with an image each."""
    names = ("pixel_values", "image_grid_thw")
    batch = {name: torch.cat([getattr(prompt, name) for prompt in prompts]) for name in names}
    batch["input_ids"] = torch.stack([prompt.input_ids for prompt in prompts])
    batch["position_ids"] = torch.stack([prompt.position_ids for prompt in prompts], dim=1)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch = {name: value.to(model.device) for name, value in batch.items()}
    return model.generate(**batch, **GREEDY, max_new_tokens=new_tokens, **options)


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
