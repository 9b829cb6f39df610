"""`keye-worker bench`: how fast this machine answers with this checkpoint, as the table people compare with."""

import time
from collections.abc import Iterator

import numpy as np

from keye.config.settings import Settings
from keye.worker.daemon.loading import load_configured_model
from keye.worker.engine.cache_sizing import measure_cache_bytes
from keye.worker.engine.step_loop import DEFAULT_LIMITS, Engine
from keye.worker.engine.step_plan import StepLimits
from keye.worker.engine.throughput import (
    answer,
    as_table,
    check_agreement,
    decode_seconds,
    encode_seconds,
    measure_engine,
    measure_generate,
)
from keye.worker.model.device import name_device
from keye.worker.model.precision import PrecisionUnavailable
from keye.worker.model.processor import KeyeProcessor, PreparedPrompt
from keye.worker.model.visual_input import Image

IMAGE_SIZE = (1120, 896)  # 1,280 visual tokens, where the checkpoint lets an image have as many
NEW_TOKENS = 128
NUM_RUNNING = (8, 32, 64)
CHECK_CACHE_BYTES = 2**30  # for one prompt, of the largest checkpoint at full size


def run_bench(settings: Settings, new_tokens: int = NEW_TOKENS) -> Iterator[str]:
    """Lines of Markdown, as they come. Raises as `load_configured_model` and `check_agreement` do."""
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

    rows = [
        measure_generate("`generate`, eager attention", model, [prompt] * 3, new_tokens, attention="eager"),
        measure_generate("`generate`, fused attention", model, [prompt] * 3, new_tokens),
        measure_generate("`generate`, batches of 8", model, [prompt] * 16, new_tokens, batch_size=8),
    ]
    encoding = encode_seconds(model, prompt)
    cache_bytes = measure_cache_bytes(model, processor, DEFAULT_LIMITS, settings.gpu_memory_fraction)
    engine = Engine(model, processor, kv_cache_bytes=cache_bytes)
    engine.start()
    engine.warm_up()
    alone = answer(engine, prompt, new_tokens)
    for num_running in NUM_RUNNING:
        prompts = [prompt] * (2 * num_running)
        rows.append(measure_engine(f"engine, {num_running} jobs", engine, prompts, new_tokens, num_running, device))
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


def _prompt(processor: KeyeProcessor) -> PreparedPrompt:
    noise = np.random.default_rng(0).integers(0, 256, (*IMAGE_SIZE, 3), np.uint8)
    content = [{"type": "image"}, {"type": "text", "text": "Describe this image."}]
    return processor.prepare([{"role": "user", "content": content}], images=[Image(noise)])
