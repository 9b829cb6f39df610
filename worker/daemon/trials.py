"""Tries the heavy parts a worker stands on: torch with its GPUs, the decoders, S3, and one answer of the model."""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import av
import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from keye.config.aws import load_aws_names
from keye.config.bounded_s3 import bound, code_of
from keye.config.faults import Fault
from keye.config.job import VideoPart
from keye.config.settings import Settings, VideoDecoder
from keye.worker.daemon.capacity import Capacity
from keye.worker.daemon.findings import Finding, Severity, fault, ok, warning
from keye.worker.daemon.preflight import check_model_files
from keye.worker.host_fault import HostFault
from keye.worker.loading.served_model import load_served_model
from keye.worker.media.frames.sample_clip import NUM_FRAMES, encode_sample_clip
from keye.worker.media.job_media import DecodedVideo, DecoderPool, MediaCache, MediaLimits, decode, fetch
from keye.worker.model.cuda_attention import HAS_BLOCK_TABLES
from keye.worker.model.device import TorchFacts, choose_device, name_device, torch_facts
from keye.worker.model.precision import choose_precision
from keye.worker.proof.golden_case import GENERATIONS
from keye.worker.proof.numbers import prove_numbers
from keye.worker.sizing import Sizing


def try_parts(settings: Settings, gpus: list[str]) -> Iterator[Finding]:
    """All but the answer; `gpus` are those the driver lists."""
    torch = torch_facts()
    yield check_torch_sees_gpus(gpus, torch)
    if gpus and torch.gpus and check_model_files(settings.model_path).severity is Severity.OK:
        assert settings.model_path is not None
        least = min(num_bytes for _, num_bytes in torch.gpus)
        yield check_gpu_memory(
            Capacity.of(settings.model_path, settings.precision, least, settings.gpu_memory_fraction)
        )
        yield from check_compiler(torch)
    yield check_decoders(settings.video_decoder)
    yield check_s3(settings.s3_endpoint_url)
    if gpus or settings.device != "cuda":
        yield check_numbers(settings)


def check_torch_sees_gpus(gpus: list[str], torch: TorchFacts) -> Finding:
    subject = "torch and CUDA"
    if not gpus:
        return ok(subject, f"torch {torch.version} on the CPU, {torch.num_threads} threads")
    if torch.cuda is None:
        cure = "Install the CUDA build: https://pytorch.org/get-started/locally/"
        return fault(subject, f"torch {torch.version} is a CPU build", cure)
    num_slices = sum(gpu.startswith("MIG-") for gpu in gpus)
    # CUDA shows a process one MIG slice, whatever else there is; each worker is started on one of its own.
    if len(torch.gpus) < (1 if num_slices else len(gpus)):
        found = f"torch {torch.version} for CUDA {torch.cuda} can use {len(torch.gpus)} of {len(gpus)} GPUs"
        cure = "Update the NVIDIA driver, or install the torch build for your driver's CUDA (see nvidia-smi)."
        return fault(subject, found, cure)
    names = ", ".join(name for name, _ in torch.gpus)
    seen = f"{names} (of {num_slices} MIG slices a process sees one)" if num_slices else names
    versions = f"driver {torch.driver}, cuDNN {torch.cudnn}, triton {torch.triton}, C compiler {torch.compiler}"
    return ok(subject, f"torch {torch.version} for CUDA {torch.cuda}: {seen}; {versions}")


def check_compiler(torch: TorchFacts) -> Iterator[Finding]:
    """Only where attention would be compiled."""
    if torch.compiler is None and not HAS_BLOCK_TABLES:
        cure = "apt install gcc libc6-dev, or install torch 2.12 or later, which needs none."
        yield warning("C compiler", f"none, and torch {torch.version} compiles attention with one: it is slower", cure)


def check_gpu_memory(capacity: Capacity) -> Finding:
    """As `keye-worker plan` reckons it, of a GPU that nobody else uses."""
    assert capacity.card is not None
    usable = f"{capacity.fraction * capacity.card / 2**30:.1f} of {capacity.card / 2**30:.1f} GiB"
    if not capacity.num_tokens:
        least = capacity.memory.usable_for(capacity.memory.block_size) / 2**30
        found = f"{usable} may be taken (KEYE_GPU_MEMORY_FRACTION), and the model wants {least:.1f} for one short job"
        return fault("GPU memory", found, "Raise the share, set KEYE_PRECISION=int8 or int4, or use a larger GPU.")
    return ok("GPU memory", f"{usable}: room for {capacity.num_tokens:,} tokens, of one job {capacity.max_tokens:,}")


def check_decoders(chosen: VideoDecoder) -> Finding:
    """A clip made here and now goes through the same door as a job's media."""
    with tempfile.TemporaryDirectory() as folder:
        clip = Path(folder) / "clip.mp4"
        limits = MediaLimits.of(Settings(media_roots=(Path(folder),)))
        part = VideoPart(uri=str(clip), fps=NUM_FRAMES)
        try:
            clip.write_bytes(encode_sample_clip().getvalue())
            fetched = fetch([part], limits, MediaCache(Path(folder), max_bytes=0))
            with DecoderPool(1, 30, limits.max_decoded_bytes, video_decoder=chosen) as decoders:
                (video,) = decode([part], fetched, limits, Sizing(28, 28**2, 1280 * 28**2), decoders)
        except (Fault, RuntimeError, av.FFmpegError) as error:
            cure = "Install av and pillow again: pip install --force-reinstall av pillow"
            return fault("decoders", f"a clip made here cannot be read back: {error}", cure)
        except (HostFault, OSError) as error:
            return fault(
                "decoders", f"this host keeps them from work: {error}", "Mend what it names, or move the worker."
            )
    assert isinstance(video, DecodedVideo)
    if video.decoder != chosen:
        cure = "torchcodec needs the libraries of FFmpeg 4 to 9: apt install ffmpeg. Or unset KEYE_VIDEO_DECODER."
        return fault("decoders", f"{chosen} cannot read a clip made here, PyAV stepped in", cure)
    library = ".".join(map(str, av.library_versions["libavcodec"]))
    return ok("decoders", f"{len(video.frames)} frames of H.264 read back, libavcodec {library}")


def check_s3(endpoint_url: str | None) -> Finding:
    """Warnings only: a worker whose jobs use no s3:// is fine without."""
    load_aws_names()
    shown = endpoint_url or "AWS"
    try:
        session = boto3.Session()
        if (credentials := session.get_credentials()) is None:
            cure = "For s3:// media set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (.env will do), or give it a role."
            return warning("S3", "no credentials", cure)
        shown = f"credentials from {credentials.method}, {shown}"
        config = Config(connect_timeout=5, read_timeout=5, retries={"total_max_attempts": 1})
        bound(session.client("s3", endpoint_url=endpoint_url, config=config)).list_buckets()
    except ClientError as error:
        code = code_of(error)
        if code in ("AccessDenied", "403"):
            return ok("S3", f"{shown} (may not list buckets)")
        return warning("S3", f"{shown}: {code}", "Correct the AWS credentials.")
    except (BotoCoreError, ValueError) as error:
        return warning("S3", f"{shown}: {error}", "Correct KEYE_S3_ENDPOINT_URL, the AWS_* settings or the network.")
    except Exception as error:  # botocore takes what a server says for what S3 would say
        found = f"{shown}: it answered as no S3 does ({type(error).__name__})"
        return warning("S3", found, "Check that KEYE_S3_ENDPOINT_URL is an S3.")
    return ok("S3", shown)


def check_numbers(settings: Settings) -> Finding:
    """Golden cases of every generation, on the installed packages and the device that a worker would use."""
    try:
        device = choose_device(settings.device)
        dtype = choose_precision(settings.precision, device).dtype
        found = prove_numbers(GENERATIONS.values(), dtype, device)
    except Exception as error:  # whatever it is, it is a finding
        cure = "Install the versions of constraints.txt. In a checkout `python -m benchmarks.first_gpu_run` tells more."
        return fault("numbers", f"{type(error).__name__}: {error}", cure)
    return ok("numbers", f"{name_device(device)}: {found}")


def try_answer(settings: Settings) -> Iterator[Finding]:
    """One image, one video and a question through the processor and the engine that a worker would run."""
    started = time.monotonic()
    try:
        served = load_served_model(settings)
        served.engine.stop()
    except Exception as error:  # whatever it is, it is a finding
        cure = "`keye-worker run` would end with MODEL_LOAD_FAILED; see docs/operations.md."
        yield fault("smoke job", f"{type(error).__name__}: {error}", cure)
        return
    seconds = time.monotonic() - started
    if seconds > settings.load_seconds:
        found = f"loaded and answered after {seconds:.1f} s, and a worker ends after {settings.load_seconds:g}"
        yield fault("smoke job", found, "Raise KEYE_LOAD_SECONDS.")
        return
    if served.warnings:
        cure = (
            f"It is answered by {served.model.attention}. Report it with this line; slower answers are the only harm."
        )
        yield warning("attention", "; ".join(served.warnings), cure)
    else:
        yield ok("attention", str(served.model.attention))
    found = f"{served.model.name} in {served.model.precision} on {served.device}, loaded and answered"
    yield ok("smoke job", f"{found} after {seconds:.1f} s")
