"""What must be right before a worker starts, of its host, its broker and its Celery: all faults at once.

Leaves nothing changed. Loads torch only for `examine`, which tries the heavy parts too.
"""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from celery import Celery
from kombu.serialization import prepare_accept_content
from packaging.requirements import Requirement
from redis import Redis
from redis.exceptions import ReadOnlyError, RedisError

from keye.config.codes import QUANTISED_BY, PrecisionSetting
from keye.config.connection import SOCKET_TIMEOUT_SECONDS, connect
from keye.config.faults import install_command
from keye.config.host import memory_bytes, num_cores
from keye.config.primary import ServerUnusable, refusal_of
from keye.config.redis_url import HOW_TO_WRITE_URL, RedisUrl
from keye.config.settings import Settings, VideoDecoder
from keye.worker.broker.transport import SCHEME
from keye.worker.daemon.findings import Finding, Severity, fault, ok, select, warning
from keye.worker.daemon.host_limits import check_host_limits, nearest_place
from keye.worker.loading.before_torch import secure_torch
from keye.worker.media.decode.sandbox import missing_layers
from keye.worker.model.checkpoint import check_checkpoint, in_short
from keye.worker.private_folder import PrivateFolder

# Leases go by the server's clock, deadlines by the producer's, logs by the host's.
WARN_SKEW_SECONDS = 2.0
CLOCK_READINGS = 3

# What a decoder takes besides pixels, which are there twice: decoded, and as the model's inputs. One brings torch.
DECODER_BYTES = {"pyav": 100 * 10**6, "decord": 100 * 10**6, "torchcodec": 450 * 10**6}

PICKLE = "application/x-python-serialize"
# Celery takes these over an app's own options.
OVERRIDES = ("CELERY_BROKER_URL", "CELERY_BROKER_READ_URL", "CELERY_BROKER_WRITE_URL", "CELERY_RESULT_BACKEND")


def check_before_start(settings: Settings, gpus: Sequence[str]) -> list[Finding]:
    # Not among the imports above: it reads the settings, and whoever calls this has told of wrong ones.
    from keye.worker.tasks.celery_app import build_app

    app = build_app(settings)
    broker = [*check_broker(settings.full_redis_url(), settings.lease_seconds, settings.require_durable)]
    if not select(broker, Severity.FAULT):
        broker += check_celery_connects(app)
    return [
        *check_packages(),
        *check_setting_names(Settings.names_given()),
        *check_celery(app.conf, os.environ),
        *broker,
        check_model_files(settings.model_path),
        check_device(settings.device, gpus),
        *check_precision(settings.precision),
        check_shares(settings, num_cores(), memory_bytes()),
        check_video_decoder(settings.video_decoder),
        check_sandbox(),
        *check_media_roots(settings.media_roots),
        check_media_cache(settings.cache_folder, settings.cache_bytes),
        check_spool(settings.spool_folder),
        check_run_folder(settings.run_folder),
        *check_host_limits(settings),
        *check_metrics_address(settings.metrics_host, settings.metrics_port),
    ]


def examine(settings: Settings, gpus: list[str]) -> Iterator[Finding]:
    """Findings as they come; the last is a job through the real engine, tried only where nothing stands in its way."""
    yield ok("Python", f"{platform.python_version()} ({sys.executable})")
    findings = check_before_start(settings, gpus)
    yield from findings
    faults = select(findings, Severity.FAULT)
    # Without a package the trials could not even be imported.
    if not any(finding.subject == "packages" for finding in faults):
        secure_torch(settings.cache_folder)
        from keye.worker.daemon.trials import try_answer, try_parts

        for finding in try_parts(settings, gpus):
            faults += select([finding], Severity.FAULT)
            yield finding
        if not faults:
            yield from try_answer(settings)
            return
    yield fault("smoke job", "not tried", "Cure the faults above first.")


def check_packages() -> Iterator[Finding]:
    """Installed versions against those this release was tested with."""
    right = []
    for requirement in map(Requirement, importlib.metadata.requires("keye-worker") or []):
        if requirement.marker and not requirement.marker.evaluate({"extra": "worker"}):
            continue
        tested = f"{requirement.name}{requirement.specifier}"
        wanted, cure = f"this release wants {tested}", f"pip install '{tested}'"
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
    """A setting that is misspelt would change nothing, and say nothing. `names` begin with KEYE_."""
    known = [f"KEYE_{field.upper()}" for field in Settings.model_fields]
    for name in names:
        if name not in known:
            cure = "".join(f"Did you mean {near}?" for near in get_close_matches(name, known, 1))
            found = f"{name} is no setting and changes nothing"
            yield warning("settings", found, cure or "Unset it; docs/reference.md lists every setting.")


def check_model_files(path: Path | None) -> Finding:
    if path is None:
        return fault("checkpoint", "KEYE_MODEL_PATH is not set", "Set it to a Keye-VL checkpoint folder.")
    try:
        faults = check_checkpoint(path)
    except OSError as error:
        faults = [f"{error.filename} cannot be read: {error.strerror}"]
    if faults:
        return fault("checkpoint", in_short(faults), "Correct KEYE_MODEL_PATH, or fetch it again.")
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


def check_precision(precision: PrecisionSetting) -> Iterator[Finding]:
    package = QUANTISED_BY.get(precision)
    if package and importlib.util.find_spec(package) is None:
        cure = f"{install_command('quantised')}, or take KEYE_PRECISION out of the settings."
        yield fault("precision", f"KEYE_PRECISION is {precision}, and {package} is not installed", cure)


def check_shares(settings: Settings, cores: int, memory: int) -> Finding:
    """Whether decoders and pixels of all workers have room in the host's memory (bytes)."""
    workers, decoders, pixels = settings.host_workers, settings.decoders, settings.max_decoded_bytes
    each = f"{decoders} decoders and {pixels / 2**30:.1f} GiB for pixels"
    has = f"{cores} cores and {memory / 2**30:.1f} GiB"
    taken = workers * (2 * pixels + settings.num_decoder_processes * DECODER_BYTES[settings.video_decoder])
    if taken > memory:
        found = f"{workers} workers with {each} each may take {taken / 2**30:.1f} GiB, and the host has {has}"
        return warning("host", found, "Lower or unset KEYE_MAX_DECODED_BYTES and KEYE_DECODERS.")
    return ok("host", f"{has}, for each of {workers} workers {each}" if workers > 1 else f"{has}, {each}")


def check_video_decoder(chosen: VideoDecoder) -> Finding:
    if chosen != "pyav" and importlib.util.find_spec(chosen) is None:
        cure = f"pip install {chosen}, or take KEYE_VIDEO_DECODER out of the settings."
        return fault("video decoder", f"KEYE_VIDEO_DECODER is {chosen}, which is not installed", cure)
    return ok("video decoder", chosen)


def check_sandbox() -> Finding:
    missing = [*missing_layers()]
    if not missing:
        return ok("decoder sandbox", "seccomp and Landlock")
    cure = "Run it on Linux 5.13 or later on x86_64 or aarch64, and see that its list of lsm= holds landlock."
    return warning("decoder sandbox", f"decoders are less confined here: this kernel has {' and '.join(missing)}", cure)


def check_media_roots(roots: Sequence[Path]) -> Iterator[Finding]:
    if not roots:
        yield ok("media roots", "none: no local media")
    for root in roots:
        if os.path.isdir(root) and os.access(root, os.R_OK | os.X_OK):
            yield ok("media roots", str(root))
        else:
            cure = "Create or mount it, or take it out of KEYE_MEDIA_ROOTS."
            yield fault("media roots", f"{root} is no folder that can be read", cure)


def check_media_cache(folder: Path, max_bytes: int) -> Finding:
    """A folder of our own that can be written, or made, with as much room as may be used."""
    private = PrivateFolder(folder, "KEYE_CACHE_FOLDER")
    if reason := _lacking(private, "whole", "partial", "digest"):
        found, _, cure = reason.partition(". ")
        return fault("media cache", found, cure or "Set KEYE_CACHE_FOLDER to a folder that this user owns or can make.")
    room = shutil.disk_usage(nearest_place(folder)).free
    room += sum(file.lstat().st_size for file in private.place.glob("whole/*"))
    if room < max_bytes:
        found = f"{folder} has room for {room / 2**30:.1f} GiB and may take {max_bytes / 2**30:.1f}"
        return warning("media cache", found, "Lower KEYE_CACHE_BYTES or use another disk.")
    return _unless_at_risk("media cache", private, f"{private.place}, up to {max_bytes / 2**30:.1f} GiB")


def check_spool(folder: Path) -> Finding:
    private = PrivateFolder(folder, "KEYE_SPOOL_FOLDER")
    if not (reason := _lacking(private)):
        return _unless_at_risk("spool", private, str(folder))
    found, _, cure = reason.partition(". ")
    found += ": a worker that ends while Redis is away loses its outcomes"
    return warning("spool", found, cure or "Set KEYE_SPOOL_FOLDER to a folder that this user can write or make.")


def check_run_folder(folder: Path) -> Finding:
    private = PrivateFolder(folder, "KEYE_RUN_FOLDER")
    if not (reason := _lacking(private)):
        return _unless_at_risk("run folder", private, str(private.place))
    found, _, cure = reason.partition(". ")
    found += ": nobody could tell whether the workers live"
    return fault("run folder", found, cure or "Set KEYE_RUN_FOLDER to a folder that this user can write or make.")


def _lacking(private: PrivateFolder, *parts: str) -> str:
    """Why the folder, or a part of it, cannot be had for this user alone, with the cure if it has one; "" if it can."""
    try:
        private.examine()
    except OSError as error:
        return f"{error.filename} cannot be used: {error.strerror}" if error.filename else str(error)
    places = (private.place, *(private.place / part for part in parts))
    return next((f"{place} cannot be written: {reason}" for place in places if (reason := _try_to_write(place))), "")


def _unless_at_risk(subject: str, private: PrivateFolder, found: str) -> Finding:
    risk, _, cure = private.examine().partition(". ")
    return warning(subject, risk, cure) if risk else ok(subject, found)


def _try_to_write(folder: Path) -> str | None:
    """Why there can be no file in the folder, made where it is not there.

    Tried beside it: a worker that starts meanwhile must not have its folder taken away. Nothing of the trial stays.
    """
    there = nearest_place(folder)
    try:
        with tempfile.TemporaryDirectory(dir=there, prefix=".keye-") as trial:
            like_it = Path(trial, folder.relative_to(there))
            like_it.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=like_it, buffering=0) as file:
                file.write(b"x")
    except OSError as error:
        return error.strerror
    return None


def check_metrics_address(host: str, port: int | None) -> Iterator[Finding]:
    """Warnings only: a worker works without its metrics."""
    if port is None:
        return
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with closing(socket.socket(family, socket.SOCK_STREAM)) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address)
    except (OSError, UnicodeError) as error:
        found = f"{host}:{port} cannot be had: {error}"
        yield warning(
            "metrics", found, "Right if a worker runs here; else correct KEYE_METRICS_HOST or KEYE_METRICS_PORT."
        )
    else:
        yield ok("metrics", f"http://{host}:{port}/metrics")


def check_broker(url: str, lease_seconds: float, require_durable: bool) -> Iterator[Finding]:
    """Reachable, never evicts, keeps what it was told, knows what time it is, asks who is there."""
    address = RedisUrl.read(url)
    shown = address.shown
    try:
        with connect(url, retries=0) as redis:
            facts = redis.info()
            skew = measure_skew(redis)
    except (ServerUnusable, ReadOnlyError) as error:
        found, _, cure = (refusal_of(error) or "").partition(". ")
        yield fault("broker", f"{shown} cannot be used: {found}", cure)
        return
    except RedisError as error:
        yield fault("broker", f"{shown} cannot be used: {error}", "Start it, or correct KEYE_REDIS_URL.")
        return
    server = f"{facts.get('server_name', 'redis')} {facts.get('valkey_version', facts['redis_version'])}"
    yield ok("broker", f"{server} at {shown}")

    yield from check_safety(facts, require_durable)
    yield check_skew(skew, lease_seconds)
    yield check_password(address)


def check_safety(facts: Mapping[str, Any], require_durable: bool) -> Iterator[Finding]:
    """Whether it may drop or lose what it was told, by its INFO."""
    policy = facts.get("maxmemory_policy", "unknown")
    if policy == "noeviction":
        yield ok("broker eviction", policy)
    else:
        cure = "Set it to noeviction: any other drops waiting jobs or results when memory is full."
        yield fault("broker eviction", f"maxmemory-policy is {policy}", cure)

    if facts.get("aof_enabled"):
        yield ok("broker persistence", "append-only file")
    else:
        cure = "Set appendonly yes: without it a crash of the broker loses accepted jobs."
        severity = Severity.FAULT if require_durable else Severity.WARNING
        found = "there is no append-only file" + ", and KEYE_REQUIRE_DURABLE is set" * require_durable
        yield Finding("broker persistence", severity, found, cure)


def measure_skew(redis: Redis) -> float:
    """By how many seconds the server's clock is ahead of ours, as the quickest of a few answers has it."""
    readings = []
    for _ in range(CLOCK_READINGS):
        asked_at = time.time()
        seconds, microseconds = redis.time()
        answered_at = time.time()
        readings.append((answered_at - asked_at, seconds + microseconds / 1e6 - (asked_at + answered_at) / 2))
    return min(readings)[1]


def check_skew(skew_seconds: float, lease_seconds: float) -> Finding:
    """`skew_seconds` as `measure_skew` has it."""
    found = f"the broker's is {abs(skew_seconds):.1f} s {'ahead of' if skew_seconds > 0 else 'behind'} this host's"
    cure = "Set both by NTP (timedatectl, chronyc tracking)."
    if abs(skew_seconds) > lease_seconds / 3:
        found += f", more than a third of the lease of {lease_seconds:g} s (KEYE_LEASE_SECONDS)"
        return fault("clock", found, cure)
    if abs(skew_seconds) > WARN_SKEW_SECONDS:
        return warning("clock", found, cure)
    return ok("clock", found)


def check_password(url: RedisUrl) -> Finding:
    if url.has_password:
        return ok("broker password", "set")
    if url.is_local:
        return ok("broker password", "none, but only this host gets in")
    cure = "Set requirepass or ACLs: who reaches an open broker can run and read every job."
    return warning("broker password", f"{url.host} is used without a password", cure)


def check_celery(conf: Mapping[str, Any], environ: Mapping[str, str]) -> Iterator[Finding]:
    """`conf` is the app's."""
    faults = [
        fault("Celery", f"{option} takes pickle", "Leave it at json: a pickle runs what it likes.")
        for option in ("accept_content", "result_accept_content")
        if PICKLE in (prepare_accept_content(conf[option]) or ())
    ]
    cure = "Unset it: jobs would wait in one server and be looked for in another."
    overrides = filter(environ.get, OVERRIDES)
    faults += [fault("Celery", f"{name} takes the place of KEYE_REDIS_URL", cure) for name in overrides]
    yield from faults or [ok("Celery", "reads json only, from KEYE_REDIS_URL")]


def check_celery_connects(app: Celery) -> Iterator[Finding]:
    """Celery reads the URL by rules of its own, once for its broker and once for its results."""
    try:
        with app.connection_for_read() as broker:
            broker.ensure_connection(max_retries=1, timeout=SOCKET_TIMEOUT_SECONDS)
            broker.default_channel.client.ping()
        app.backend.client.ping()
    except Exception as error:
        # Without its words: they may quote the password.
        yield fault("broker", f"Celery cannot use KEYE_REDIS_URL ({type(error).__name__})", HOW_TO_WRITE_URL)


def check_transport(conf: Mapping[str, Any]) -> Iterator[Finding]:
    """Whether messages are read before Celery reads them."""
    if conf["broker_transport"] != SCHEME:
        found = f"broker_transport is {conf['broker_transport']!r}"
        yield fault("Celery", found, f"Leave it at {SCHEME}: by any other, one malformed message ends every worker.")
