"""What is in deploy/ and config/ for others' programs is what these programs understand."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from keye.config.codes import ErrorCode
from keye.config.settings import Settings
from keye.worker.daemon.exit_codes import ExitCode
from keye.worker.daemon.supervisor import KILL_MARGIN_SECONDS
from tests.support.checkout import ROOT
from tests.support.debian import need

UNIT = ROOT / "deploy/systemd/keye-worker.service"
ALERTS = ROOT / "config/prometheus/alerts.yml"
MANIFESTS = sorted(ROOT.glob("deploy/kubernetes/*.yaml"))
RESOURCES: list[dict[str, Any]] = [each for path in MANIFESTS for each in yaml.safe_load_all(path.read_text())]
DEPLOYMENTS = [each for each in RESOURCES if each["kind"] == "Deployment"]
SCALED = [each for each in RESOURCES if each["kind"] == "ScaledObject"]
DRAIN_SECONDS = Settings.model_fields["drain_seconds"].default + KILL_MARGIN_SECONDS
SETTINGS = {f"KEYE_{name.upper()}" for name in Settings.model_fields}
# KEDA publishes no schema where we can have one offline: the fields of its reference that may stand in a spec.
SCALED_FIELDS = {
    *("scaleTargetRef", "pollingInterval", "cooldownPeriod", "initialCooldownPeriod", "idleReplicaCount"),
    *("minReplicaCount", "maxReplicaCount", "fallback", "advanced", "triggers"),
}
TRIGGER_FIELDS = {"type", "name", "metricType", "metadata", "authenticationRef", "useCachedMetrics"}
PROMETHEUS_FIELDS = {
    *("serverAddress", "query", "threshold", "activationThreshold", "namespace", "customHeaders", "authModes"),
    *("ignoreNullValues", "queryParameters", "unsafeSsl", "timeout"),
}


@pytest.mark.holds("docs/deploy.md#kubernetes", "The manifests are checked against Kubernetes' own schemas")
@pytest.mark.parametrize("resource", RESOURCES, ids=lambda each: f"{each['kind']} {each['metadata']['name']}")
def test_kubernetes_takes_every_manifest(resource: dict[str, Any]) -> None:
    if resource["kind"] != "ScaledObject":
        kubernetes_validate.validate(resource, "1.31", strict=True)
        return
    assert resource["apiVersion"] == "keda.sh/v1alpha1"
    spec = resource["spec"]
    assert spec.keys() <= SCALED_FIELDS
    for trigger in spec["triggers"]:
        assert trigger.keys() <= TRIGGER_FIELDS
        assert trigger["type"] == "prometheus"
        assert {"serverAddress", "query", "threshold"} <= trigger["metadata"].keys() <= PROMETHEUS_FIELDS
        assert all(isinstance(value, str) for value in trigger["metadata"].values())


def test_a_field_that_kubernetes_does_not_know_is_found() -> None:
    misspelt = json.loads(json.dumps(DEPLOYMENTS[0]).replace("terminationGracePeriodSeconds", "gracePeriodSeconds"))
    with pytest.raises(kubernetes_validate.ValidationError, match="gracePeriodSeconds"):
        kubernetes_validate.validate(misspelt, "1.31", strict=True)


def test_each_kind_of_gpu_has_its_deployment_budget_and_scaling() -> None:
    names = {
        kind: {each["metadata"]["name"] for each in RESOURCES if each["kind"] == kind}
        for kind in ("Deployment", "PodDisruptionBudget", "ScaledObject")
    }
    assert len(names["Deployment"]) == 2
    assert names["Deployment"] == names["PodDisruptionBudget"] == names["ScaledObject"]
    assert {each["spec"]["scaleTargetRef"]["name"] for each in SCALED} == names["Deployment"]
    service = next(each for each in RESOURCES if each["kind"] == "Service")
    for each in DEPLOYMENTS:
        labels = each["spec"]["template"]["metadata"]["labels"]
        assert each["spec"]["selector"]["matchLabels"].items() <= labels.items()
        assert service["spec"]["selector"].items() <= labels.items()


@pytest.mark.holds(
    "docs/deploy.md#kubernetes",
    "`terminationGracePeriodSeconds` is more than `KEYE_DRAIN_SECONDS`, 10 seconds and the pause before",
)
@pytest.mark.holds(
    "docs/operations.md#how-do-i-stop-or-restart-a-worker-without-losing-jobs",
    "Give your service manager or container more time than that before it kills",
)
def test_no_manager_kills_before_the_drain_is_over() -> None:
    for each in DEPLOYMENTS:
        pod = each["spec"]["template"]["spec"]
        pause = float(pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
        assert pod["terminationGracePeriodSeconds"] > DRAIN_SECONDS + pause
    assert float(unit_values("TimeoutStopSec")[0]) > DRAIN_SECONDS


def test_only_settings_are_set() -> None:
    config = next(each for each in RESOURCES if each["kind"] == "ConfigMap")
    assert config["data"].keys() <= SETTINGS
    assert set(re.findall(r"\bKEYE_[A-Z_]+\b", UNIT.read_text())) <= SETTINGS


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    analyze = need("systemd-analyze")
    # It looks whether the program is there.
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/keye/bin/keye-worker", "/bin/true"))
    told = subprocess.run([analyze, "verify", "--man=no", unit], capture_output=True, text=True)
    assert (told.returncode, told.stderr) == (0, "")
    rated = subprocess.run(
        [analyze, "security", "--offline=yes", "--no-pager", "--threshold=30", unit], capture_output=True, text=True
    )
    assert rated.returncode == 0, rated.stdout + rated.stderr


@pytest.mark.holds("docs/deploy.md#systemd", "but for 14: a model that five times could not be loaded")
def test_systemd_tries_again_but_for_a_model_that_cannot_be_loaded() -> None:
    told = {ExitCode(int(code)) for code in unit_values("RestartPreventExitStatus")}
    assert told == {ExitCode.CHILD_NEVER_READY}


def unit_values(name: str) -> list[str]:
    (line,) = re.findall(rf"^{name}=(.*)$", UNIT.read_text(), re.MULTILINE)
    return line.split()


@pytest.mark.holds("docs/alerts.md#keyetargetdown", "Prometheus hears nothing from a host, or from any.")
@pytest.mark.holds(
    "docs/alerts.md#an-alert-fired-what-does-it-mean-and-what-do-i-do",
    "None fires on a deployment that is idle or busy and well",
)
def test_rules_are_right_and_fire_as_their_examples_say(tmp_path: Path) -> None:
    promtool = need("promtool")
    for name in (ALERTS, ROOT / "tests/support/alerts_test.yml"):
        shutil.copy(name, tmp_path)
    told = subprocess.run([promtool, "test", "rules", "alerts_test.yml"], cwd=tmp_path, capture_output=True, text=True)
    assert told.returncode == 0, told.stdout + told.stderr


def rules() -> dict[str, dict[str, Any]]:
    return {rule["alert"]: rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]}


@pytest.mark.holds(
    "docs/alerts.md#an-alert-fired-what-does-it-mean-and-what-do-i-do",
    "`tests/support/alerts_test.yml` holds that, and what each fires on",
)
def test_each_alert_has_an_example_and_a_page() -> None:
    tests = yaml.safe_load((ROOT / "tests/support/alerts_test.yml").read_text())["tests"]
    fired = {each["alertname"] for test in tests for each in test["alert_rule_test"] if each.get("exp_alerts")}
    silent = [
        {each["alertname"] for each in test["alert_rule_test"] if not each.get("exp_alerts")}
        for test in tests
        if "healthy" in test["name"]
    ]
    headings = re.findall(r"^## (Keye\w+)$", (ROOT / "docs/alerts.md").read_text(), re.MULTILINE)
    assert sorted(rules()) == sorted(fired) == sorted(headings)
    assert len(silent) == 2
    assert all(each == rules().keys() for each in silent)


@pytest.mark.holds("docs/alerts.md#keyejobsfail", "fail by codes that are nobody's input")
def test_failures_that_alert_are_those_of_the_service() -> None:
    named = set(re.findall(r'code=~"([^"]+)"', rules()["KeyeJobsFail"]["expr"])[0].split("|"))
    assert named == {code.value for code in ErrorCode if code.facts.blame == "service"}
