"""Examines everything a worker needs, from Python to one answer of the model. Loads torch, and only when asked to."""

import platform
import sys
from collections.abc import Iterator

from keye.config.settings import Settings
from keye.worker.daemon.findings import Finding, Severity, fault, ok, select
from keye.worker.daemon.preflight import check_before_start, check_packages


def examine(settings: Settings, gpus: list[str]) -> Iterator[Finding]:
    """Findings as they come; the last is a job through the real engine, tried only where nothing stands in its way."""
    findings = []
    for finding in _checks(settings, gpus):
        findings.append(finding)
        yield finding
    if select(findings, Severity.FAULT):
        yield fault("smoke job", "not tried", "Cure the faults above first.")
    else:
        from keye.worker.daemon.trials import check_smoke_job

        yield check_smoke_job(settings)


def _checks(settings: Settings, gpus: list[str]) -> Iterator[Finding]:
    yield ok("Python", f"{platform.python_version()} ({sys.executable})")
    yield from check_before_start(settings, gpus)
    if select(list(check_packages()), Severity.FAULT):
        return  # the trials could not even be imported
    from keye.worker.daemon import trials
    from keye.worker.model.device import torch_facts
    from keye.worker.model.precision import WEIGHT_SHARE

    torch = torch_facts()
    yield trials.check_torch_sees_gpus(gpus, torch)
    if gpus and settings.model_path is not None:
        num_file_bytes = sum(file.stat().st_size for file in settings.model_path.glob("*.safetensors"))
        yield trials.check_gpu_memory(int(WEIGHT_SHARE[settings.precision] * num_file_bytes), torch)
    yield trials.check_decoders(settings.video_decoder)
    yield trials.check_s3(settings.s3_endpoint_url)
