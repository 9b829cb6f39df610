"""How fast a machine answers: the engine and plain `generate` on the same prompts, once both answer them alike.

`keye-worker bench` measures the configured checkpoint, `benchmarks/` others; settings are read by the first only.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from secrets import token_bytes
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from keye.worker.engine.inbox import Generated, SamplingOptions
from keye.worker.engine.memory import measure_cache_bytes
from keye.worker.engine.step_loop import DEFAULT_LIMITS, Engine
from keye.worker.engine.step_plan import StepLimits
from keye.worker.model.device import name_device
from keye.worker.model.image_processing import Image
from keye.worker.model.keye import KeyeForConditionalGeneration
from keye.worker.model.processor import KeyeProcessor, PreparedPrompt

if TYPE_CHECKING:
    from keye.config.settings import Settings

IMAGE_SIZE = (1120, 896)  # 1,280 visual tokens, where the checkpoint lets an image have as many
NEW_TOKENS = 128
NUM_RUNNING = (8, 32, 64)
BATCH_SIZE = 8
NUM_ROUNDS = 3
CHECK_CACHE_BYTES = 2**30  # for one prompt, of the largest checkpoint at full size

PLAIN = "`generate`, fused attention"
IN_8_BITS = "`generate`, 8-bit weights"

# As the article has them: seconds an image, images a second, gigabytes.
ELSEWHERE = (
    ("default", 1.2, 0.83, 28),
    ("half precision and FlashAttention", 0.45, 2.22, 18),
    ("8-bit weights", 0.6, 1.67, 14),
    ("half precision, batches of 8 in 2.8 s", 0.35, 2.86, 32),
)

# By the rules of `answer`: nothing that the checkpoint's own options say.
GREEDY: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
GREEDY |= {"repetition_penalty": 1.0, "eos_token_id": None, "pad_token_id": 0}

# Two sums of the same numbers in another order differ by about so many of a precision's smallest steps. In float32
# kernels round too, to what tensor cores multiply.
TIE_STEPS = 4
FINEST_STEP = 2.0**-12


class Measured(str):
    """A row of Markdown; its `facts` are what it says, for programs."""

    facts: dict[str, Any]

    def __new__(cls, row: str, **facts: Any) -> "Measured":
        measured = super().__new__(cls, row)
        measured.facts = facts
        return measured

    def in_words(self) -> str:
        """For a terminal that is narrower than the row."""
        name, *facts = self.facts.items()
        return f"{name[1]}: " + ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in facts)


def run_bench(
    settings: "Settings", new_tokens: int = NEW_TOKENS, tell: Callable[[str], object] = lambda _: None
) -> Iterator[str]:
    """Lines of Markdown, as they come. Raises as `load_configured_model` and `check_agreement` do.

    What it will take, and what is measured now, goes to `tell`.
    """
    # Here, because benchmarks run where there is torch and no pydantic.
    from keye.worker.daemon.capacity import Capacity, card_bytes
    from keye.worker.daemon.feeding import KINDS, measure_feeding
    from keye.worker.loading.served_model import load_configured_model

    places, num_places = count(1), 4 + len(NUM_RUNNING) + len(KINDS)

    def measuring(what: str) -> None:
        tell(f"{next(places)} of {num_places}: {what}")

    if settings.model_path is not None:
        # What is wrong with a checkpoint is told by loading it.
        with suppress(OSError, KeyError, ValueError):
            card = card_bytes(settings.device)
            tell(Capacity.of(settings.model_path, settings.precision, card, settings.gpu_memory_fraction).in_words())
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
        alone = answer(engine, prompt, new_tokens)
    finally:
        engine.stop()
    tell(how_long(alone.queued_seconds + alone.generate_seconds, len(KINDS)))
    yield f"engine and `generate` say the same, {num_alike} of {new_tokens} tokens alike\n"
    encoding = encode_seconds(model, prompt)
    assert alone.first_token_seconds is not None
    yield "| stage of one job alone | ms |"
    yield "|---|---|"
    for stage, seconds in (
        ("prepare the image, on the CPU", prepare_seconds),
        ("encode the image", encoding),
        ("read the prompt", alone.first_token_seconds - encoding),
        ("write a token", decode_seconds(alone)),
    ):
        yield Measured(f"| {stage} | {1000 * seconds:.2f} |", measured=stage, milliseconds=round(1000 * seconds, 2))
    yield ""

    table, fed = Table(measuring), []
    yield from table.head()
    yield from measure_plain(table, model, [prompt] * BATCH_SIZE, new_tokens)
    try:
        cache_bytes = measure_cache_bytes(model, processor, DEFAULT_LIMITS, settings.gpu_memory_fraction)
        engine = Engine(model, processor, kv_cache_bytes=cache_bytes)
        engine.start()
        engine.warm_up()
    except Exception as error:
        yield table.unmeasured("engine", error)
    else:
        try:
            for num in NUM_RUNNING:
                jobs = [prompt] * (2 * num)
                yield table.row(f"engine, {num} jobs", partial(measure_engine, engine, jobs, new_tokens, num, device))
            # Told last: it is another table.
            fed = list(measure_feeding(engine, processor, device, settings, max(NUM_RUNNING), new_tokens, measuring))
        finally:
            engine.stop()
    # Else the whole model would lie on the GPU beside its own smaller copy.
    del engine, model

    def measure_smaller() -> Row:
        smaller = load_configured_model(settings.model_copy(update={"precision": "int8"})).model
        return measure_generate(smaller, [prompt], new_tokens)

    yield table.row(IN_8_BITS, measure_smaller)
    yield from table.elsewhere()
    yield ""
    yield from fed


def how_long(answer_seconds: float, num_kinds: int) -> str:
    """Of all measures, from one answer: as long as their answers one by one, or, the better it batches, their turns."""
    turns = NUM_ROUNDS * (4 + 2 * len(NUM_RUNNING)) + 4 * num_kinds
    answers = NUM_ROUNDS * (3 + BATCH_SIZE + 2 * sum(NUM_RUNNING)) + 4 * num_kinds * max(NUM_RUNNING)
    shortest, longest = (max(1, round(number * answer_seconds / 60)) for number in (turns, answers))
    return f"An answer takes {answer_seconds:.1f} s, all measures {shortest} to {longest} minutes. Ctrl-C ends it."


def each_in_a_thread(run: Callable[[Any], Any], jobs: Iterable[Any], num_threads: int) -> list[Any]:
    """What it gives for each; raises what the first to fail raised. Who ends the wait does not wait for the rest."""
    threads = ThreadPoolExecutor(num_threads)
    try:
        return list(threads.map(run, jobs))
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


class JobSeconds(NamedTuple):
    """How long a job took, and how long of it from its first token on."""

    whole: float
    decoding: float


@dataclass(frozen=True, slots=True)
class Row:
    """Seconds an image, of each round; the share of decoding in the time of a job; the most that torch had allocated.

    `peak_bytes` is None on a CPU.
    """

    seconds: Sequence[float]
    decode_share: float
    peak_bytes: int | None

    @property
    def images_per_second(self) -> float:
        return 1 / median(self.seconds)


class Table:
    """In Markdown, told row by row as it is measured. Ratios are to plain `generate` with fused attention."""

    def __init__(self, measuring: Callable[[str], object] = lambda _: None) -> None:
        """Each row's name goes to `measuring` before it is measured."""
        self.measured: dict[str, Row] = {}
        self._measuring = measuring

    def head(self) -> Iterator[str]:
        yield f"Medians and ranges of {NUM_ROUNDS} rounds; decoding is its share of the time of a job.\n"
        yield "| | s/image | from - to | images/s | ratio | decoding | memory |"
        yield "|---|---|---|---|---|---|---|"

    def row(self, name: str, measure: Callable[[], Row]) -> str:
        """What it measures or, where it fails, why."""
        self._measuring(name)
        try:
            row = self.measured[name] = measure()
        except Exception as error:
            return self.unmeasured(name, error)
        speed, plain = row.images_per_second, self.measured.get(PLAIN)
        spread = f"{min(row.seconds):.3f} - {max(row.seconds):.3f}"
        ratio = "" if plain is None else f"{speed / plain.images_per_second:.2f}"
        memory = "" if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.1f} GiB"
        return Measured(
            f"| {name} | {1 / speed:.3f} | {spread} | {speed:.2f} | {ratio} | {row.decode_share:.0%} | {memory} |",
            measured=name,
            seconds_per_image=round(1 / speed, 3),
            fastest=round(min(row.seconds), 3),
            slowest=round(max(row.seconds), 3),
            images_per_second=round(speed, 2),
            ratio=None if plain is None else round(speed / plain.images_per_second, 2),
            decode_share=round(row.decode_share, 2),
            peak_bytes=row.peak_bytes,
        )

    def unmeasured(self, name: str, error: Exception) -> str:
        return unmeasured(name, error, num_cells=6)

    def elsewhere(self) -> Iterator[str]:
        """What an article that many start from reports, of pictures and answers that it does not tell."""
        for name, seconds, speed, gigabytes in ELSEWHERE:
            name = f"reported elsewhere, not measured here: A100 40 GB, {name}"
            yield f"| {name} | {seconds} | | {speed} | | | {gigabytes} GB |"


def unmeasured(name: str, error: Exception, num_cells: int) -> Measured:
    reason = f"{type(error).__name__}: {error}".splitlines()[0].replace("|", "/")
    row = f"| {name} | not measured: {reason} |{' |' * (num_cells - 1)}"
    return Measured(row, measured=name, not_measured=reason)


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


def measure_plain(
    table: Table, model: KeyeForConditionalGeneration, prompts: Sequence[PreparedPrompt], new_tokens: int
) -> Iterator[str]:
    """The rows of `generate` at the model's own precision; all `prompts` are the batch of the last."""
    one = prompts[:1]
    yield table.row(PLAIN, partial(measure_generate, model, one, new_tokens))
    yield table.row("`generate`, eager attention", partial(measure_generate, model, one, new_tokens, attention="eager"))
    yield table.row(f"`generate`, batches of {len(prompts)}", partial(measure_generate, model, prompts, new_tokens))


def measure_generate(
    model: KeyeForConditionalGeneration,
    prompts: Sequence[PreparedPrompt],
    new_tokens: int,
    *,
    attention: str = "sdpa",
) -> Row:
    """The plain approach: `generate` on one batch of prompts of equal length, time and again."""
    model.set_attn_implementation(attention)

    def run() -> list[JobSeconds]:
        began, first_token = time.perf_counter(), _FirstToken(model.device)
        _generate(model, prompts, new_tokens, stopping_criteria=StoppingCriteriaList([first_token]))
        wait_for(model.device)
        ended = time.perf_counter()
        return [JobSeconds(ended - began, ended - first_token.came_at)]

    _generate(model, prompts, 2)  # first calls load kernels
    return _measured(run, len(prompts), model.device)


def measure_engine(
    engine: Engine, prompts: Sequence[PreparedPrompt], new_tokens: int, num_running: int, device: torch.device
) -> Row:
    """As many threads as jobs run at once, each handing in its next job when its last has ended."""

    def run() -> list[JobSeconds]:
        answers = each_in_a_thread(lambda prompt: answer(engine, prompt, new_tokens), prompts, num_running)
        return [JobSeconds(each.queued_seconds + each.generate_seconds, _decoding(each)) for each in answers]

    return _measured(run, len(prompts), device)


def anew(prompt: PreparedPrompt) -> PreparedPrompt:
    """The same prompt, of which an engine finds nothing in its caches that it has computed for another."""
    return replace(prompt, salt=token_bytes(16))


def answer(engine: Engine, prompt: PreparedPrompt, new_tokens: int) -> Generated:
    """One greedy generation. An engine whose processor has no end tokens writes exactly `new_tokens`."""
    pending = engine.inbox.submit(anew(prompt), SamplingOptions(new_tokens))
    for _ in pending.deltas():
        pass
    return pending.generated


def decode_seconds(generated: Generated) -> float:
    """Seconds a step, of a generation that ran alone."""
    return _decoding(generated) / (len(generated.token_ids) - 1)


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


def _decoding(generated: Generated) -> float:
    """Seconds from its first token on."""
    assert generated.first_token_seconds is not None
    return generated.queued_seconds + generated.generate_seconds - generated.first_token_seconds


def _measured(run: Callable[[], list[JobSeconds]], num_images: int, device: torch.device) -> Row:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    jobs: list[JobSeconds] = []
    seconds = []
    for _ in range(NUM_ROUNDS):
        began = time.perf_counter()
        jobs += run()
        seconds.append((time.perf_counter() - began) / num_images)
    whole, decoding = map(sum, zip(*jobs, strict=True))
    peak_bytes = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return Row(seconds, decoding / whole, peak_bytes)


class _FirstToken(StoppingCriteria):
    """Stops nothing; `came_at` is when `generate` had its first token."""

    came_at = 0.0

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if not self.came_at:
            wait_for(self._device)
            self.came_at = time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _prompt(processor: KeyeProcessor) -> PreparedPrompt:
    noise = np.random.default_rng(0).integers(0, 256, (*IMAGE_SIZE, 3), np.uint8)
    content = [{"type": "image"}, {"type": "text", "text": "Describe this image."}]
    return processor.prepare([{"role": "user", "content": content}], images=[Image(noise)])


def _generate(
    model: KeyeForConditionalGeneration, prompts: Sequence[PreparedPrompt], new_tokens: int, **options: Any
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
