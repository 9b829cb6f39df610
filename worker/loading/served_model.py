"""A checkpoint folder to an engine that has answered once. Knows no queue; whoever answers jobs calls it."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import av

import keye
from keye.config.codes import QUANTISED_BY
from keye.config.host import share_of_cores
from keye.config.outcome import ModelIdentity
from keye.config.settings import Settings, VideoDecoder
from keye.worker.engine.memory import measure_cache_bytes
from keye.worker.engine.step_loop import DEFAULT_LIMITS, Engine
from keye.worker.model.checkpoint_digest import digest_checkpoint
from keye.worker.model.device import choose_device, keep_to_cores, name_device
from keye.worker.model.keye import KeyeForConditionalGeneration
from keye.worker.model.load import load_model
from keye.worker.model.precision import Precision, choose_precision
from keye.worker.model.processor import KeyeProcessor
from keye.worker.proof.golden_case import GENERATIONS
from keye.worker.proof.numbers import prove_numbers
from keye.worker.tasks.sampling import load_sampling
from keye.worker.telemetry import tell_warnings

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A running engine and what it runs: `device` as people name it ("cpu", "NVIDIA H100 80GB HBM3").

    `warnings` say what it has to do without.
    """

    engine: Engine
    processor: KeyeProcessor
    sampling: dict[str, Any]
    model: ModelIdentity
    device: str
    warnings: tuple[str, ...] = ()


class LoadedModel(NamedTuple):
    path: Path
    model: KeyeForConditionalGeneration
    processor: KeyeProcessor
    precision: Precision


def find_versions(decoder: VideoDecoder, precision: Precision) -> tuple[str, ...]:
    """Of what decides which numbers come out: this release, its packages, and FFmpeg's libraries."""
    packages = ["torch", "transformers", "tokenizers", "numpy", "pillow", "av"]
    packages += [decoder] * (decoder != "pyav")
    packages += [package for name, package in QUANTISED_BY.items() if name == precision.name]
    versions = {"keye-worker": keye.__version__} | {package: version(package) for package in packages}
    libraries = ("libavcodec", "libavformat", "libswscale")
    versions |= {library: ".".join(map(str, av.library_versions[library])) for library in libraries}
    return tuple(f"{name}=={number}" for name, number in versions.items())


def load_configured_model(settings: Settings) -> LoadedModel:
    """The checkpoint as settings have it, on their device.

    Raises `ValueError` where none is set, `CheckpointFault`, `PrecisionUnavailable`, and whatever torch does.
    """
    tell_warnings()
    path = settings.model_path
    if path is None:
        raise ValueError("KEYE_MODEL_PATH is not set. Set it to a Keye-VL checkpoint folder.")
    device = choose_device(settings.device)
    precision = choose_precision(settings.precision, device)
    model = load_model(path, dtype=precision.dtype, device=device, quantization=precision.quantization)
    return LoadedModel(path, model, KeyeProcessor.from_checkpoint(path), precision)


def load_served_model(settings: Settings, before_start: Callable[[], object] = lambda: None) -> ServedModel:
    """Load, prove the numbers, start and warm up; `before_start` is called once all but the engine's thread is there.

    Raises `NumbersDiffer`, `NoRightAttention` and `Fault` too, and what `before_start` does.
    """
    started = time.monotonic()
    keep_to_cores(choose_device(settings.device), share_of_cores(settings.host_workers), settings.decoders)
    path, model, processor, precision = load_configured_model(settings)
    processor.shares_prefixes = settings.prefix_cache
    loaded = time.monotonic()
    logger.info("numbers: %s", prove_numbers([GENERATIONS[model.config.model_type]], model.dtype, model.device))
    cache_bytes = measure_cache_bytes(model, processor, DEFAULT_LIMITS, settings.gpu_memory_fraction)
    engine = Engine(model, processor, kv_cache_bytes=cache_bytes)
    before_start()
    engine.start()
    engine.warm_up()
    identity = ModelIdentity(
        name=path.name,
        model_type=model.config.model_type,
        precision=precision.name,
        attention=engine.attention.name,
        checkpoint=digest_checkpoint(path),
        packages=find_versions(settings.video_decoder, precision),
    )
    device_name = name_device(model.device)
    logger.info(
        "%s (%s on %s) is loaded after %.1f s and has answered after %.1f s",
        *(path.name, precision.name, device_name, loaded - started, time.monotonic() - started),
    )
    return ServedModel(engine, processor, load_sampling(path), identity, device_name, engine.attention.refused)
