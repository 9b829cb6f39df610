"""The worker in a container as docker-compose.yml describes one: what it may not do, it does not need."""

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
import yaml

from keye.config.faults import JobFailed
from keye.producer import Client
from keye.producer.job import Job
from keye.worker.daemon.exit_codes import ExitCode
from keye.worker.demo.errands import Errand, draw_errands
from tests.ecosystem.container import UID, Container
from tests.support.checkout import ROOT
from tests.support.compromised_decoder import PROGRAM, assert_harmless
from tests.support.conditions import eventually
from tests.support.debian import need

KEYE_WORKER = (sys.executable, "-P", "-m", "keye.worker.daemon.entry")
SERVICE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["worker-cpu"]
BUCKET = "demo"


@pytest.fixture
def container(redis_url: str, s3_endpoint: str, tmp_path: Path) -> Iterator[Container]:
    """It runs, and has loaded nothing yet."""
    runc = need("runc")
    if os.geteuid():
        pytest.skip("containers want root")
    environ = {name: str(value) for name, value in SERVICE["environment"].items()} | {
        # What is another's in compose: the network, and where this machine's Python lies.
        "KEYE_REDIS_URL": redis_url,
        "KEYE_METRICS_HOST": "127.0.0.1",
        "KEYE_S3_ENDPOINT_URL": s3_endpoint,
        "KEYE_MEDIA_ROOTS": str(tmp_path / "media"),
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": str(ROOT / "src"),
    }
    with Container(runc, tmp_path, [*KEYE_WORKER, "run"], environ, SERVICE["tmpfs"]) as container:
        yield container


@pytest.fixture
def errands(container: Container, s3_endpoint: str) -> list[Errand]:
    """The demonstration's: images, videos and answers that can be checked, from files and from S3."""
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
    store = boto3.client("s3", endpoint_url=s3_endpoint, **keys)
    store.create_bucket(Bucket=BUCKET)

    def upload(path: Path) -> str:
        store.upload_file(str(path), BUCKET, path.name)
        return f"s3://{BUCKET}/{path.name}"

    return draw_errands(container.media, upload)


def is_healthy(container: Container, *options: str) -> bool:
    """By the health check of docker-compose.yml."""
    kind, program, *check = SERVICE["healthcheck"]["test"]
    assert (kind, program) == ("CMD", "keye-worker")
    assert container.process.poll() is None, container.log
    return container.run(*KEYE_WORKER, *(options or check)).returncode == 0


def ending(job: Job) -> str:
    try:
        return job.result(timeout=120).answer
    except JobFailed as failed:
        return failed.code


@pytest.mark.holds(
    "docs/operations.md#what-can-a-broken-or-hostile-file-do",
    "let no other process of their user read or trace them",
)
@pytest.mark.holds(
    "docs/deploy.md#docker-compose",
    "They run the worker under `runc` with the rights, mounts and health check of the compose file",
)
def test_the_worker_answers_the_demonstration_in_a_container(
    container: Container, client: Client, errands: list[Errand]
) -> None:
    eventually(lambda: is_healthy(container, "probe", "--ready"), within_seconds=120)
    assert is_healthy(container)

    jobs = [client.submit(errand.job) for errand in errands]
    assert [ending(job) for job in jobs] == [errand.expected for errand in errands]
    # Decoders have no sockets inside Docker's profile, too, and what could be left undone is told.
    assert "refuse" not in container.log
    assert "preflight" not in container.log

    # Of the processes of its user, whose environment that user can read.
    script = "for one in /proc/[0-9]*; do head -c 1 $one/environ >/dev/null 2>&1 && cat $one/cmdline; echo; done"
    readable = container.run("/bin/sh", "-c", script).stdout
    assert "keye.worker.media.decode.child" in readable
    assert "keye.worker.daemon" not in readable

    # It is as tight as it is meant to be, or all this proves nothing.
    told = container.run("/usr/bin/cat", "/proc/1/status").stdout
    facts = dict(line.split(":\t", 1) for line in told.splitlines())
    assert facts["Uid"].split() == [str(UID)] * 4
    assert {int(facts[name], 16) for name in ("CapBnd", "CapEff", "CapPrm")} == {0}
    assert (facts["NoNewPrivs"], facts["Seccomp"]) == ("1", "2")
    assert "Read-only file system" in container.run("/usr/bin/touch", "/etc/written").stderr
    assert "Operation not permitted" in container.run("/usr/bin/unshare", "--user", "/usr/bin/true").stderr
    shared = container.run("/usr/bin/df", "--output=size", "/dev/shm").stdout
    assert shared.split()[1] == str(64 * 2**10)

    began = time.monotonic()
    container.signal("TERM")
    assert container.process.wait(60) == ExitCode.OK, container.log
    grace_seconds = float(SERVICE["stop_grace_period"].removesuffix("s"))
    assert time.monotonic() - began < grace_seconds


@pytest.mark.holds(
    "docs/operations.md#what-can-a-broken-or-hostile-file-do", "and in a container with Docker's default"
)
def test_code_that_takes_a_decoder_over_is_confined_in_a_container_too(tmp_path: Path) -> None:
    runc = need("runc")
    if os.geteuid():
        pytest.skip("containers want root")
    environ = {"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    with Container(runc, tmp_path, [*PROGRAM], environ, SERVICE["tmpfs"]) as container:
        assert container.process.wait(60) == 0, container.log
        assert_harmless(json.loads(container.log.splitlines()[-1]))
