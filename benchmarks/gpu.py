"""`python -m benchmarks.gpu`: the engine at the real 8B sizes on one GPU, with random weights made there. As Markdown.

Needs torch, transformers, numpy and pillow only. With `--tiny` the same on whatever device there is, in seconds.
"""

import argparse
import logging
import time
from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.roofline import Floors, measure_ceilings
from benchmarks.synthetic_keye import Size, make_model, make_processor, make_prompt, real_size, tiny_size
from keye.worker.daemon.bench import (
    BATCH_SIZE,
    CHECK_CACHE_BYTES,
    IN_8_BITS,
    Table,
    answer,
    check_agreement,
    decode_seconds,
    encode_seconds,
    measure_engine,
    measure_generate,
    measure_plain,
)
from keye.worker.engine.inbox import SamplingOptions
from keye.worker.engine.memory import measure_cache_bytes
from keye.worker.engine.step_loop import Engine
from keye.worker.engine.step_plan import StepLimits
from keye.worker.model.device import choose_device, name_device
from keye.worker.model.keye import KeyeForConditionalGeneration
from keye.worker.model.precision import choose_precision
from keye.worker.model.processor import PreparedPrompt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script itself")
    size = tiny_size() if parser.parse_args().tiny else real_size()
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)7.0f ms %(message)s")
    device = choose_device("auto")
    print(f"{name_device(device)}, torch {torch.__version__}: random weights in {size.dtype},")
    print(f"{size.grid[0] * size.grid[1] // 4} visual tokens an image, {size.new_tokens} new tokens an answer.\n")
    for line in benchmark(size, device):
        print(line, flush=True)


def benchmark(size: Size, device: torch.device) -> Iterator[str]:
    """Lines of Markdown, as they come: plain rows, the engine's rows, then what the device could do at best."""
    ceilings = measure_ceilings(size, device)
    torch.manual_seed(0)
    model = make_model(size, device)
    floors = Floors.of(ceilings, size, model)
    processor = make_processor(size)
    prompts = [make_prompt(size, seed) for seed in range(2 * max(size.num_running))]
    new = size.new_tokens

    began = time.perf_counter()
    engine = Engine(model, processor, kv_cache_bytes=CHECK_CACHE_BYTES, limits=StepLimits(max_running=1))
    engine.start()
    try:
        num_alike = check_agreement(engine, model, prompts[0], new)
        ready_seconds = time.perf_counter() - began
        alone = answer(engine, prompts[1], new)
    finally:
        engine.stop()
    yield f"An engine was ready after {ready_seconds:.1f} s, its first answer and `generate`'s included."
    yield f"They say the same, {num_alike} of {new} tokens alike.\n"
    encoding = encode_seconds(model, prompts[0])

    table = Table()
    yield from table.head()
    yield from measure_plain(table, model, prompts[:BATCH_SIZE], new)
    full_step = None
    try:
        cache_bytes = measure_cache_bytes(model, processor, size.limits, memory_fraction=0.9)
        engine = Engine(model, processor, kv_cache_bytes=cache_bytes, limits=size.limits)
        engine.start()
        full_step = _full_step_seconds(engine, prompts[: size.limits.max_running], new)
    except Exception as error:
        yield table.unmeasured("engine", error)
    else:
        for num in size.num_running:
            jobs = prompts[: 2 * num]
            yield table.row(f"engine, {num} jobs", partial(measure_engine, engine, jobs, new, num, device))
    engine.stop()
    yield table.row(IN_8_BITS, lambda: measure_generate(_in_8_bits(model), prompts[:1], new))
    yield from table.elsewhere()

    yield f"\nA copy moves {ceilings.bytes_per_second / 1e12:.2f} TB/s, a matrix product does"
    yield f"{ceilings.operations_per_second / 1e12:.0f} TFLOP/s, both measured here.\n"
    assert alone.first_token_seconds is not None
    yield "| | ms | floor, ms | ratio |"
    yield "|---|---|---|---|"
    for name, seconds, floor in (
        ("encode an image", encoding, floors.encode),
        ("read its prompt", alone.first_token_seconds - encoding, floors.prefill),
        ("decoding step, 1 job", decode_seconds(alone), floors.decode_alone),
        (f"decoding step, {size.limits.max_running} jobs", full_step, floors.decode_full),
    ):
        if seconds is not None:
            yield f"| {name} | {1000 * seconds:.2f} | {1000 * floor:.2f} | {seconds / floor:.2f} |"
    roofline = floors.images_per_second(size)
    reached = table.measured.get(f"engine, {max(size.num_running)} jobs")
    yield f"\nRoofline {roofline:.1f} images/s" + (
        f": {max(size.num_running)} jobs reach {100 * reached.images_per_second / roofline:.0f} %." if reached else "."
    )


def _full_step_seconds(engine: Engine, prompts: list[PreparedPrompt], new_tokens: int) -> float:
    """Seconds of a step in which all these jobs decode: from the last one's first token on."""
    pendings = [engine.inbox.submit(prompt, SamplingOptions(new_tokens)) for prompt in prompts]
    for pending in pendings:
        next(pending.deltas())
    before = engine.snapshot()
    for pending in pendings:
        for _ in pending.deltas():
            pass
    after = engine.snapshot()
    return (after.step_seconds - before.step_seconds) / (after.steps - before.steps)


def _in_8_bits(model: KeyeForConditionalGeneration) -> KeyeForConditionalGeneration:
    """The decoder's layers, in place. Raises `PrecisionUnavailable`."""
    choose_precision("int8", model.device)
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model.model.layers, Int8WeightOnlyConfig())
    return model


if __name__ == "__main__":
    main()
