"""Proves the numbers of this machine: golden cases through processor and engine, on its packages and its device.

Each generation runs in float32, to the errors that tests/golden/README.md accepts, and then in a worker's precision.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from keye.worker.engine.inbox import SamplingOptions
from keye.worker.engine.step_loop import Engine
from keye.worker.engine.step_plan import StepLimits
from keye.worker.model.image_processing import ImageProcessor
from keye.worker.model.load import load_model
from keye.worker.model.processor import KeyeProcessor, PreparedPrompt
from keye.worker.proof.golden_case import GoldenCase

NUM_TOKENS = 24

# Ten times and more below what the mildest mistake costs.
ACCEPTED_PIXEL_ERROR = 1e-6
ACCEPTED_LOGIT_ERROR = 2e-4
# A grey level, of frames that are resized as tensors, and hardly any on average.
ACCEPTED_FRAME_ERROR = 0.012
ACCEPTED_MEAN_FRAME_ERROR = 1e-4
# Half precision, of the largest logit and in its own smallest steps: over all golden cases bfloat16 and float16, which
# has eight times finer ones, both leave 1.3 to 3.2 on a CPU.
ACCEPTED_STEPS = 8

# Prompts come in chunks, some of them beside decoding.
_LIMITS = StepLimits(max_running=4, max_step_tokens=48)
_CACHE_BYTES = 2**25


class NumbersDiffer(Exception):
    """The model does not compute here what the reference computed; the sentence says where, and by how much."""


def prove_numbers(generations: Iterable[Path], dtype: torch.dtype, device: torch.device) -> str:
    """A sentence on what was proven, with the largest errors. Raises `NumbersDiffer`."""
    proofs = [_Proof(generation, device) for generation in generations]
    said = []
    for each in dict.fromkeys((torch.float32, dtype)):
        worst = max((proof.run(each) for proof in proofs), key=lambda error: error.share)
        said.append(f"{_short(each)} logits off by {worst.largest:.1e} at most ({worst.accepted:.1e} accepted)")
    names = " and ".join(proof.generation.name for proof in proofs)
    return f"{names} as the reference: pixels, ids, positions, {NUM_TOKENS} tokens of each case; {', '.join(said)}"


class _Error(NamedTuple):
    largest: float
    accepted: float

    @property
    def share(self) -> float:
        return self.largest / self.accepted


class _Proof:
    """Of one generation, on a device. Raises `NumbersDiffer` wherever a number is off."""

    def __init__(self, generation: Path, device: torch.device) -> None:
        self.generation = generation
        self._device = device
        self._prompts: dict[GoldenCase, PreparedPrompt] = {}
        # Between the two best logits in float32, token by token.
        self._margins: dict[GoldenCase, Tensor] = {}
        with _named(generation.name):
            self._processor = KeyeProcessor.from_checkpoint(generation / "checkpoint")
            for case in GoldenCase.of(generation):
                (self._prompts[case],) = case.prepare(self._processor)
                _check_prompt(case, self._prompts[case], self._processor.image_processor)

    def run(self, dtype: torch.dtype) -> _Error:
        """Each case alone, then all of them beside each other; float32 comes first. The largest error of logits."""
        worst = _Error(0, 1)
        with _named(f"{self.generation.name} in {_short(dtype)}"), self._engine(dtype) as (engine, steps):
            for case, prompt in self._prompts.items():
                steps.clear()
                (written,) = _answers(engine, [prompt])
                # A chunk that does not end its prompt has no rows, and a captured step tells nothing.
                logits = torch.cat(steps).float().cpu()
                difference = logits[0] - case.arrays["last_logits"][0]
                error = _Error(float(difference.abs().max()), _accepted_logit_error(case, dtype))
                _check(f"logits of {case.name}", error)
                worst = max(worst, error, key=lambda each: each.share)
                if dtype is torch.float32:
                    best = logits.topk(2).values
                    self._margins[case] = best[:, 0] - best[:, 1]
                self._check_tokens(case, written, dtype)
            together = _answers(engine, list(self._prompts.values()))
            for case, written in zip(self._prompts, together, strict=True):
                self._check_tokens(case, written, dtype)
        return worst

    @contextmanager
    def _engine(self, dtype: torch.dtype) -> Iterator[tuple[Engine, list[Tensor]]]:
        """A running engine, and the logits of its steps as they come."""
        model = load_model(self.generation / "checkpoint", dtype=dtype, device=self._device)
        engine = Engine(model, self._processor, kv_cache_bytes=_CACHE_BYTES, limits=_LIMITS)
        engine.start()
        try:
            engine.warm_up()
            steps: list[Tensor] = []
            model.lm_head.register_forward_hook(lambda _, __, logits: steps.append(logits))
            yield engine, steps
        finally:
            engine.stop()

    def _check_tokens(self, case: GoldenCase, written: Sequence[int], dtype: torch.dtype) -> None:
        """The reference's, or up to where half precision may well prefer another."""
        expected = case.arrays["generated_ids"][0].tolist()
        parting = next((i for i, pair in enumerate(zip(written, expected, strict=True)) if pair[0] != pair[1]), None)
        if parting is not None and self._margins[case][parting] > 2 * _accepted_logit_error(case, dtype):
            raise NumbersDiffer(
                f"token {parting + 1} of {case.name} is {written[parting]}, the reference's is {expected[parting]}"
            )


def _check_prompt(case: GoldenCase, prompt: PreparedPrompt, images: ImageProcessor) -> None:
    arrays = case.arrays
    for name, ours, expected in (
        ("ids", prompt.input_ids, arrays["input_ids"][0]),
        ("positions", prompt.position_ids, arrays["position_ids"][:, 0]),
        ("image grids", prompt.image_grid_thw, arrays.get("image_grid_thw")),
        ("video grids", prompt.video_grid_thw, arrays.get("video_grid_thw")),
    ):
        if expected is not None and not (ours is not None and torch.equal(ours, expected)):
            raise NumbersDiffer(f"{name} of {case.name} are not the reference's")
    for name in ("pixel_values", "pixel_values_videos"):
        if (expected := arrays.get(name)) is None:
            continue
        errors = (images.normalise(getattr(prompt, name)) - expected).abs()
        is_resized_as_tensor = name == "pixel_values_videos" and case.has_exact_frame_sizes
        accepted = ACCEPTED_FRAME_ERROR if is_resized_as_tensor else ACCEPTED_PIXEL_ERROR
        _check(f"{name} of {case.name}", _Error(float(errors.max()), accepted))
        if is_resized_as_tensor:
            _check(f"{name} of {case.name} on average", _Error(float(errors.mean()), ACCEPTED_MEAN_FRAME_ERROR))


def _accepted_logit_error(case: GoldenCase, dtype: torch.dtype) -> float:
    in_steps = ACCEPTED_STEPS * torch.finfo(dtype).eps * float(case.arrays["last_logits"].abs().max())
    return max(ACCEPTED_LOGIT_ERROR, in_steps)


def _check(what: str, error: _Error) -> None:
    # Turned round, so that numbers that are none do not pass.
    if not error.largest <= error.accepted:
        raise NumbersDiffer(f"{what} are off by {error.largest:.1e}, {error.accepted:.1e} is accepted")


def _answers(engine: Engine, prompts: Sequence[PreparedPrompt]) -> list[Sequence[int]]:
    """Token ids of greedy answers, written beside each other."""
    pendings = [engine.inbox.submit(prompt, SamplingOptions(NUM_TOKENS)) for prompt in prompts]
    for pending in pendings:
        for _ in pending.deltas():
            pass
    return [pending.generated.token_ids for pending in pendings]


@contextmanager
def _named(of: str) -> Iterator[None]:
    """Whatever fails, a library that names an argument otherwise say, is numbers that could not be proven."""
    try:
        yield
    except NumbersDiffer as differ:
        raise NumbersDiffer(f"{of}: {differ}") from differ.__cause__
    except Exception as error:
        raise NumbersDiffer(f"{of}: {type(error).__name__}: {error}") from error


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
