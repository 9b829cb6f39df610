"""What must be right before a worker starts, all faults at once. Changes nothing; never imports torch."""

import importlib.metadata
import importlib.util
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path

from packaging.requirements import Requirement

from keye.config.settings import Settings, VideoDecoder
from keye.worker.daemon.broker import check_broker, check_celery
from keye.worker.daemon.findings import Finding, fault, ok, warning
from keye.worker.media.decode.sandbox import can_refuse_sockets
from keye.worker.model.checkpoint import check_checkpoint


def check_before_start(settings: Settings, gpus: Sequence[str]) -> list[Finding]:
    # Not among the imports above: it reads the settings, and whoever calls this has told of wrong ones.
    from keye.worker.tasks.celery_app import celery_app

    url = settings.redis_url.get_secret_value()
    return [
        *check_packages(),
        *check_setting_names(os.environ),
        *check_celery(celery_app.conf, os.environ),
        *check_broker(url, settings.lease_seconds, settings.require_durable),
        check_model_files(settings.model_path),
        check_device(settings.device, gpus),
        check_video_decoder(settings.video_decoder),
        check_sandbox(),
        *check_media_roots(settings.media_roots),
        check_media_cache(settings.cache_folder, settings.cache_bytes),
        check_spool(settings.spool_folder),
    ]


def check_packages() -> Iterator[Finding]:
    """Installed versions against those this release was tested with."""
    right = []
    for line in importlib.metadata.requires("keye-worker") or []:
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": "worker"}):
            continue
        wanted = f"this release wants {requirement.name}{requirement.specifier}"
        cure = f"pip install '{requirement.name}{requirement.specifier}'"
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield fault("packages", f"{requirement.name} is not installed, {wanted}", cure)
            continue
        if requirement.specifier.contains(version, prereleases=True):
            right.append(f"{requirement.name} {version}")
        else:
            yield warning("packages", f"{requirement.name} is {version}, {wanted}", cure)
    yield ok("packages", ", ".join(right))


def check_setting_names(names: Iterable[str]) -> Iterator[Finding]:
    """A setting that is misspelt would change nothing, and say nothing."""
    known = [f"KEYE_{field.upper()}" for field in Settings.model_fields]
    for name in names:
        if name.upper().startswith("KEYE_") and name.upper() not in known:
            cure = "".join(f"Did you mean {near}?" for near in get_close_matches(name, known, 1))
            found = f"{name} is no setting and changes nothing"
            yield warning("settings", found, cure or "Unset it; docs/reference.md lists every setting.")


def check_model_files(path: Path | None) -> Finding:
    if path is None:
        return fault("checkpoint", "KEYE_MODEL_PATH is not set", "Set it to a Keye-VL checkpoint folder.")
    if faults := check_checkpoint(path):
        return fault("checkpoint", "; ".join(faults), "Correct KEYE_MODEL_PATH, or fetch it again.")
    return ok("checkpoint", str(path))


def check_device(device: str, gpus: Sequence[str]) -> Finding:
    if gpus:
        return ok("device", f"{len(gpus)} GPU: {', '.join(gpus)}")
    if device == "cuda":
        cure = "Run nvidia-smi, which says why, or set KEYE_DEVICE=auto to run on the CPU."
        return fault("device", "KEYE_DEVICE is cuda and no GPU is visible", cure)
    if device == "auto" and shutil.which("nvidia-smi"):
        cure = "Run nvidia-smi, which says why, or set KEYE_DEVICE=cpu if that is meant."
        return warning("device", "CPU: no GPU is visible although there is an NVIDIA driver", cure)
    return ok("device", "CPU")


def check_video_decoder(chosen: VideoDecoder) -> Finding:
    if chosen != "pyav" and importlib.util.find_spec(chosen) is None:
        cure = f"pip install {chosen}, or take KEYE_VIDEO_DECODER out of the settings."
        return fault("video decoder", f"KEYE_VIDEO_DECODER is {chosen}, which is not installed", cure)
    return ok("video decoder", chosen)


def check_sandbox() -> Finding:
    if can_refuse_sockets():
        return ok("decoder sandbox", "the kernel keeps decoders off the network")
    found = "decoders are not kept off the network: this kernel has no seccomp filters, or is of another machine"
    cure = "Run it on Linux on x86_64 or aarch64, or give the worker only the network it needs."
    return warning("decoder sandbox", found, cure)


def check_media_roots(roots: Sequence[Path]) -> Iterator[Finding]:
    if not roots:
        yield ok("media roots", "none: no local media")
    for root in roots:
        if root.is_dir() and os.access(root, os.R_OK | os.X_OK):
            yield ok("media roots", str(root))
        else:
            cure = "Create or mount it, or take it out of KEYE_MEDIA_ROOTS."
            yield fault("media roots", f"{root} is no folder that can be read", cure)


def check_media_cache(folder: Path, max_bytes: int) -> Finding:
    """A folder of our own that can be written, or made, with as much room as may be used."""
    there = _nearest_place(folder)
    is_ours = there != folder or folder.stat().st_uid == os.geteuid()
    if not (is_ours and _can_write(there)):
        cure = "Set KEYE_CACHE_FOLDER to a folder that this user owns or can make."
        return fault("media cache", f"{folder} cannot be written by this user", cure)
    room = shutil.disk_usage(there).free + sum(file.stat().st_size for file in folder.glob("whole/*"))
    if room < max_bytes:
        found = f"{folder} has room for {room / 2**30:.1f} GiB and may take {max_bytes / 2**30:.1f}"
        return warning("media cache", found, "Lower KEYE_CACHE_BYTES or use another disk.")
    return ok("media cache", f"{folder}, up to {max_bytes / 2**30:.1f} GiB")


def check_spool(folder: Path) -> Finding:
    if _can_write(_nearest_place(folder)):
        return ok("spool", str(folder))
    found = f"{folder} cannot be written by this user: a worker that ends while Redis is away loses its outcomes"
    return warning("spool", found, "Set KEYE_SPOOL_FOLDER to a folder that this user can write or make.")


def _nearest_place(folder: Path) -> Path:
    """The folder, or what is to be made into the way to it."""
    return next(place for place in (folder, *folder.parents) if place.exists())


def _can_write(place: Path) -> bool:
    return place.is_dir() and os.access(place, os.W_OK | os.X_OK)
