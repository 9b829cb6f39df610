"""docs/deploy.md: what it says of the compose file, the unit and the manifests stands in them."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from keye.config.settings import ProducerSettings, Settings
from keye.worker.daemon.supervisor import KILL_MARGIN_SECONDS
from tests.support.checkout import ROOT
from tests.support.pages import printed

COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
UNIT = (ROOT / "deploy/systemd/keye-worker.service").read_text()
RESOURCES: list[dict[str, Any]] = [
    each for path in sorted(ROOT.glob("deploy/kubernetes/*.yaml")) for each in yaml.safe_load_all(path.read_text())
]
PODS = [each["spec"]["template"]["spec"] for each in RESOURCES if each["kind"] == "Deployment"]
DRAIN_SECONDS = Settings.model_fields["drain_seconds"].default


def of_kind(kind: str) -> list[dict[str, Any]]:
    return [each for each in RESOURCES if each["kind"] == kind]


def section(heading: str) -> str:
    return " ".join((ROOT / "docs/deploy.md").read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0].split())


@pytest.mark.holds("docs/deploy.md#docker-compose", "cp config/worker.env.example .env")
@pytest.mark.holds("docs/deploy.md#systemd", "useradd --system keye")
@pytest.mark.holds("docs/deploy.md#kubernetes", "kubectl create secret generic keye-worker")
def test_commands_name_files_and_names_that_are_there() -> None:
    compose, systemd, kubernetes = (
        printed("docs/deploy.md", heading, language="")[0] for heading in ("Docker Compose", "systemd", "Kubernetes")
    )
    for command in (compose, systemd, kubernetes):
        for file in re.findall(r"\b(?:config|deploy)/\S+", command):
            assert (ROOT / file).exists(), file
    assert "docker compose exec worker " in compose
    assert "worker" in SERVICES
    # What the commands make is where the unit looks for it.
    (user,) = re.findall(r"^User=(.*)$", UNIT, re.MULTILINE)
    (environment,) = re.findall(r"^EnvironmentFile=(.*)$", UNIT, re.MULTILINE)
    (program,) = re.findall(r"^ExecStart=(\S+)/bin/keye-worker run$", UNIT, re.MULTILINE)
    assert f"useradd --system {user}\n" in systemd
    assert f"config/worker.env.example {environment} " in systemd
    assert f"python3 -m venv {program} && {program}/bin/pip install" in systemd
    secret = {ref["secretRef"]["name"] for pod in PODS for ref in pod["containers"][0]["envFrom"] if "secretRef" in ref}
    assert secret == {re.findall(r"secret generic (\S+)", kubernetes)[0]}


@pytest.mark.holds(
    "docs/deploy.md#docker-compose", "profile | starts", "Which services start is said by `COMPOSE_PROFILES`"
)
def test_profiles_start_what_the_table_says() -> None:
    page = section("Docker Compose")
    profiles = {name for service in SERVICES.values() for name in service.get("profiles", ())}
    assert profiles == set(re.findall(r"\| `(\w+)` \|", page))
    assert re.search(r"^#?COMPOSE_PROFILES=", (ROOT / "config/worker.env.example").read_text(), re.MULTILINE)
    (device,) = SERVICES["worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert (device["count"], device["capabilities"]) == ("all", ["gpu"])
    assert "./worker/demo/checkpoint:/model:ro" in SERVICES["worker-cpu"]["volumes"]
    for name in ("prometheus", "grafana", "flower"):
        (port,) = SERVICES[name]["ports"]
        assert f"`{port.rpartition(':')[0]}`" in page, name


@pytest.mark.holds("docs/deploy.md#docker-compose", "Only what the container decides itself is fixed")
@pytest.mark.holds(
    "docs/deploy.md#docker-compose", "What is kept, in volumes", "The checkpoint and local media are folders"
)
def test_what_is_fixed_and_what_is_kept() -> None:
    assert all(SERVICES[name]["env_file"] == ".env" for name in ("worker", "worker-cpu"))
    where = {f"KEYE_{name}" for name in ("MODEL_PATH", "MEDIA_ROOTS", "CACHE_FOLDER", "SPOOL_FOLDER", "RUN_FOLDER")}
    fixed = where | {"KEYE_REDIS_URL", "KEYE_METRICS_HOST", "KEYE_METRICS_PORT", "HOME"}
    assert SERVICES["worker"]["environment"].keys() == fixed
    assert SERVICES["worker-cpu"]["environment"].keys() == fixed | {"KEYE_DEVICE", "KEYE_PRECISION"}
    assert COMPOSE["volumes"].keys() == {"redis-data", "cache", "spool", "prometheus-data", "grafana-data"}
    for name in ("worker", "worker-cpu"):
        volumes = SERVICES[name]["volumes"]
        assert {each.partition(":")[0] for each in volumes if not each.endswith(":ro")} == {"cache", "spool"}
        assert {each.split(":")[-2] for each in volumes if each.endswith(":ro")} == {"/model", "/media"}


@pytest.mark.holds("docs/deploy.md#docker-compose", "The `keye` of a shell in the same folder reads it, too.")
def test_a_password_in_single_quotes_is_read_from_the_env_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = re.findall(r"`(KEYE_REDIS_PASSWORD='\S+')`", section("Docker Compose"))
    (tmp_path / ".env").write_text(f"{line}\n")
    monkeypatch.chdir(tmp_path)
    password = ProducerSettings.read().redis_password
    assert password is not None
    assert f"KEYE_REDIS_PASSWORD='{password.get_secret_value()}'" == line


@pytest.mark.holds("docs/deploy.md#docker-compose", "With `KEYE_DRAIN_SECONDS` above 75, raise `stop_grace_period`")
def test_up_to_75_seconds_of_drain_need_no_other_grace() -> None:
    grace_seconds = float(COMPOSE["x-worker"]["stop_grace_period"].removesuffix("s"))
    assert grace_seconds > 75 + KILL_MARGIN_SECONDS


@pytest.mark.holds(
    "docs/deploy.md#docker-compose", "`docker build --build-arg WHEELS=cpu .` takes the same releases without CUDA"
)
def test_the_image_without_cuda_takes_the_same_releases() -> None:
    steps = (ROOT / "Dockerfile").read_text()
    stages = dict(re.findall(r"^FROM (\S+) AS (\w+)$", steps, re.MULTILINE))
    assert re.search(r"^ARG WHEELS=cuda$", steps, re.MULTILINE)
    assert stages["${WHEELS}"] == "worker"
    assert "FROM uv AS cpu\nENV UV_TORCH_BACKEND=cpu\n" in steps
    assert "UV_CONSTRAINT=constraints.txt" in steps.split("AS flower")[0]


@pytest.mark.holds("docs/deploy.md#systemd", "`systemctl stop` drains: the unit waits 90 seconds")
@pytest.mark.holds("docs/deploy.md#systemd", "It is started again after 30 seconds however it ended, but for 14")
@pytest.mark.holds("docs/deploy.md#systemd", "The unit may write three folders of its own and reads the rest")
def test_the_unit_does_what_the_page_says() -> None:
    values = dict(re.findall(r"^(\w+)=(.*)$", UNIT, re.MULTILINE))
    page = section("systemd")
    waits = f"waits {values['TimeoutStopSec']} seconds, more than `KEYE_DRAIN_SECONDS` ({DRAIN_SECONDS:g})"
    assert f"{waits} and the {KILL_MARGIN_SECONDS:g} after" in page
    assert float(values["TimeoutStopSec"]) > DRAIN_SECONDS + KILL_MARGIN_SECONDS
    assert values["KillMode"] == "mixed"
    assert f"started again after {values['RestartSec']} seconds" in page
    assert f"but for {values['RestartPreventExitStatus']}:" in page
    assert values["Restart"] == "always"
    folders = [values[f"{name}Directory"] for name in ("Cache", "State", "Runtime")]
    assert folders == ["keye"] * 3
    assert "ReadWritePaths" not in values
    assert (values["ProtectSystem"], values["ProtectHome"]) == ("strict", "yes")


@pytest.mark.holds(
    "docs/deploy.md#kubernetes", "`worker-h100.yaml` and `worker-l40s.yaml` are one Deployment for each kind of GPU"
)
@pytest.mark.holds("docs/deploy.md#kubernetes", "They want an image `keye-worker`, a claim `keye-model`")
@pytest.mark.holds("docs/deploy.md#kubernetes", "A disruption budget lets one of each kind go at a time.")
@pytest.mark.holds("docs/deploy.md#kubernetes", "Probes are `keye-worker probe`", "`settings.yaml` has the settings")
@pytest.mark.holds("docs/deploy.md#kubernetes", "Scaling wants KEDA and a Prometheus", "each is asked for half of it")
@pytest.mark.holds("docs/deploy.md#kubernetes", "At least one worker of each kind stays")
def test_the_manifests_are_as_the_page_says() -> None:
    assert len(PODS) == 2
    for pod in PODS:
        (worker,) = pod["containers"]
        assert worker["image"].partition(":")[0] == "keye-worker"
        assert worker["resources"]["limits"]["nvidia.com/gpu"] == "1"
        claims = [
            each["persistentVolumeClaim"]["claimName"] for each in pod["volumes"] if "persistentVolumeClaim" in each
        ]
        assert claims == ["keye-model"]
        assert {"configMapRef": {"name": "keye-worker"}} in worker["envFrom"]
        for name, option in (("startup", "live"), ("liveness", "live"), ("readiness", "ready")):
            assert worker[f"{name}Probe"]["exec"]["command"] == ["keye-worker", "probe", f"--{option}"]
    (config,) = of_kind("ConfigMap")
    assert config["data"]["KEYE_REDIS_URL"].startswith("redis://redis:6379/")
    assert "Redis" not in {each["metadata"]["name"] for each in RESOURCES}
    assert [each["spec"]["maxUnavailable"] for each in of_kind("PodDisruptionBudget")] == [1, 1]
    scaled = [each["spec"] for each in of_kind("ScaledObject")]
    assert [each["minReplicaCount"] for each in scaled] == [1, 1]
    assert [each["maxReplicaCount"] for each in scaled] == [8, 8]
    triggers = [trigger for each in scaled for trigger in each["triggers"]]
    assert {each["type"] for each in triggers} == {"prometheus"}
    # Each of two kinds has as many as finish half of the work in ten minutes.
    assert {each["metadata"]["query"] for each in triggers} == {"max(keye_work_waiting_seconds)"}
    assert {int(each["metadata"]["threshold"]) for each in triggers} == {2 * 600}
