"""`keye-worker doctor` and the check before a start agree with `keye-worker run`, whatever a setting is."""

import json
import math
import subprocess
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
from pydantic.fields import FieldInfo
from typer.testing import CliRunner

from keye.config.connection import connect
from keye.config.faults import InvalidSettings
from keye.config.presence import list_present
from keye.config.settings import Settings
from keye.worker.daemon.cli import app
from keye.worker.daemon.exit_codes import ExitCode
from keye.worker.daemon.findings import Finding, Severity, select
from keye.worker.daemon.gpus import visible_gpus
from keye.worker.daemon.preflight import check_before_start
from tests.acceptance.conftest import Start
from tests.support.ports import free_port

ECHO = {"CELERY_WORKER_INCLUDE": "tests.acceptance.echo_engine"}
NO_WORDS = ("x", "\udcff", "ä")
NO_NUMBERS = ("inf", "nan", "1e12", "9" * 30, "-1")
# A worker that is idle for longer must not be taken for one that hangs.
LEAST_STEP_SECONDS = "2"
# Which start beside the model: with more of them it takes two cores longer than the shortest limits on a load.
MAX_DECODERS_OF_A_SHORT_LOAD = 4


def values(name: str, field: FieldInfo, url: str, folder: Path) -> Iterator[str]:
    """Empty, at the bounds and just beyond them, malformed, and what only a setting of this kind may be."""
    yield from ("", " ", *NO_WORDS)
    for rule in field.metadata:
        for bound in (getattr(rule, side, None) for side in ("ge", "gt", "le", "lt")):
            if bound is not None:
                yield from map(str, (bound, math.nextafter(bound, -math.inf), math.nextafter(bound, math.inf)))
                yield from map(str, (int(bound) - 1, int(bound) + 1, *NO_NUMBERS))
    if get_origin(field.annotation) is Literal:
        yield from get_args(field.annotation)
    if field.annotation is bool:
        yield from ("true", "false", "1", "yes")
    match name:
        case "redis_url":
            yield from (
                url.removesuffix("/0") + rest for rest in ("", "/0", "/1", "/abc", "/1/2", "/99999", "?db=x", "#/0")
            )
            yield from (f"{url}?{option}" for option in ("timeout=x", "foo=1", "socket_timeout=1", "ssl_ca_certs=/x"))
            yield from (url.replace("redis:", scheme) for scheme in ("unix:", "rediss:", "http:", "sentinel:", ""))
        case "s3_endpoint_url":
            yield from ("http://127.0.0.1:1", "http://my_minio", "minio:9000", "http://[::1", "http://a:b")
        case "s3_buckets":
            yield from ("photos,scans", "s3://photos", "s3://photos/2026", "a b")
        case "https_hosts":
            yield from (
                "media.example.com,*.cdn.example.com",
                "93.184.215.14",
                "https://media.example.com/a",
                "*",
                "a b",
            )
        case "key_prefix":
            yield from ("blue:", "blue", "*", f"{'n' * 64}:")
        case "celery_canvas":
            yield from ("results/*", "results")
        case "metrics_port":
            yield str(free_port())
        case "metrics_host":
            yield from ("0.0.0.0", "::1", "localhost", "256.0.0.1", "no.such.host.invalid", "a" * 70, "..")
        case _ if "folder" in name or name in ("model_path", "media_roots"):
            folder.mkdir(exist_ok=True)
            (folder / "file").touch()
            yield from (str(folder), str(folder / "new/below"), str(folder / "file"), str(folder / "file/below"))
            yield from (
                "/proc/keye",
                "/sys/keye",
                str(folder / ("n" * 300)),
                f"/{'n/' * 3000}",
                "~",
                "~nobody-here/x",
                "..",
            )


def verdict(monkeypatch: pytest.MonkeyPatch, settings: Mapping[str, str]) -> list[Finding] | str:
    """What the check before a start finds, or which setting could not be read."""
    with monkeypatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        try:
            read = Settings.read()
            return check_before_start(read, visible_gpus(read.device, {}))
        except InvalidSettings as error:
            return str(error)


@pytest.fixture
def right(redis_url: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Settings that a worker runs with, in a working directory of its own."""
    monkeypatch.chdir(tmp_path)
    folders = {f"KEYE_{name}_FOLDER": str(tmp_path / name.lower()) for name in ("CACHE", "SPOOL", "RUN")}
    own = {"KEYE_REDIS_URL": redis_url, "KEYE_MODEL_PATH": str(checkpoint), "KEYE_METRICS_PORT": str(free_port())}
    return own | folders | {"HOME": str(tmp_path / "home"), "KEYE_DEVICE": "cpu", "KEYE_MEDIA_ROOTS": str(tmp_path)}


@pytest.mark.holds("docs/operations.md#it-does-not-start-why", "What passes this check runs")
def test_what_passes_the_check_runs_and_what_runs_not_is_told_by_name(
    right: dict[str, str], start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    passed: dict[str, list[str]] = {}
    for name, field in Settings.model_fields.items():
        setting = f"KEYE_{name.upper()}"
        tried = values(name, field, right["KEYE_REDIS_URL"], tmp_path / "tried")
        for value in dict.fromkeys((right.get(setting, ""), *tried)):
            found = verdict(monkeypatch, right | {setting: value})
            if isinstance(found, str):
                assert found.startswith(setting), f"{value!r}: {found}"
            elif faults := select(found, Severity.FAULT):
                # Of its value; or, where it is unset, of its being needed.
                assert all(fault.cure for fault in faults), value
            else:
                passed.setdefault(setting, []).append(value)
    assert passed.keys() >= {f"KEYE_{name.upper()}" for name in Settings.model_fields} - {"KEYE_REDIS_PASSWORD"}
    # Each worker tries one value of each setting.
    for together in zip_longest(*passed.values()):
        chosen = {name: value for name, value in zip(passed, together, strict=True) if value is not None}
        if int(chosen.get("KEYE_DECODERS", "").strip() or 1) > MAX_DECODERS_OF_A_SHORT_LOAD:
            chosen.pop("KEYE_LOAD_SECONDS", None)
        found = verdict(monkeypatch, right | chosen)
        assert not isinstance(found, str), found
        assert not select(found, Severity.FAULT), (chosen, found)
        worker = start("keye.worker.daemon.cli", "run", **(right | chosen | ECHO))
        prefix = chosen.get("KEYE_KEY_PREFIX", "").strip()
        with connect(chosen.get("KEYE_REDIS_URL", right["KEYE_REDIS_URL"]), key_prefix=prefix) as worker.redis:
            ready = worker.wait_until_ready()
            if chosen.get("KEYE_STEP_SECONDS") == LEAST_STEP_SECONDS:
                with pytest.raises(subprocess.TimeoutExpired):
                    worker.exit_code(within_seconds=2 * int(LEAST_STEP_SECONDS))
            assert list_present(worker.redis) == [ready], worker.log
            worker.ask_to_end()
            assert worker.exit_code() == ExitCode.OK, worker.log


def test_a_setting_that_cannot_be_read_is_a_finding_of_doctor_for_people_and_machines(right: dict[str, str]) -> None:
    wrong = right | {"KEYE_S3_ENDPOINT_URL": "my_minio:9000", "KEYE_LEASE_SECONDS": "inf"}
    answer = CliRunner().invoke(app, ["doctor", "--json"], env=wrong, catch_exceptions=False)
    (finding,) = map(json.loads, answer.stdout.splitlines())
    assert (answer.exit_code, finding["severity"]) == (ExitCode.PREFLIGHT_FAILED, "fault")
    assert "KEYE_S3_ENDPOINT_URL: it is no endpoint" in finding["found"]
    assert "KEYE_LEASE_SECONDS: Input should be less than or equal to 86400" in finding["found"]
    answer = CliRunner().invoke(app, ["doctor"], env=wrong, catch_exceptions=False)
    assert answer.exit_code == ExitCode.PREFLIGHT_FAILED
    assert "KEYE_S3_ENDPOINT_URL" in answer.stdout


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_PROFILE", "AWS_DEFAULT_REGION"])
def test_aws_settings_that_boto_cannot_read_are_a_warning_of_doctor(right: dict[str, str], name: str) -> None:
    wrong = right | {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", name: "no such"}
    answer = CliRunner().invoke(app, ["doctor", "--json"], env=wrong, catch_exceptions=False)
    found = {finding["subject"]: finding for finding in map(json.loads, answer.stdout.splitlines())}
    assert found["S3"]["severity"] == "warning"
    assert answer.exit_code == ExitCode.OK
