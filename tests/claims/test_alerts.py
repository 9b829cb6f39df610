"""docs/alerts.md: its numbers are those of the rules, and what it says to look at is there."""

import json
import re
from typing import Any

import pytest
import yaml

from keye.worker.daemon import supervisor
from keye.worker.daemon.exit_codes import ExitCode, describe
from keye.worker.telemetry import health
from tests.support.checkout import ROOT

PAGE = (ROOT / "docs/alerts.md").read_text()
SECTIONS = {text.partition("\n")[0]: " ".join(text.split()) for text in PAGE.split("\n## ")[1:]}
RULES: dict[str, dict[str, Any]] = {
    rule["alert"]: rule
    for group in yaml.safe_load((ROOT / "config/prometheus/alerts.yml").read_text())["groups"]
    for rule in group["rules"]
}
PANELS = {
    panel["title"]: " ".join(target["expr"] for target in panel["targets"])
    for panel in json.loads((ROOT / "config/grafana/keye.json").read_text())["panels"]
}
# What the page says, and what of the rule makes it so.
SAID = {
    "KeyeRedisDown": [("That host cannot use Redis", "keye_redis_up == 0")],
    "KeyeNoReadyWorker": [
        ("For ten minutes", "10m"),
        ("no worker of any host", 'max(keye_workers{state="ready"}) == 0'),
    ],
    "KeyeDrainTooLong": [("more than an hour", "> 3600"), ("takes the workers that are ready", "keye_drain_seconds")],
    "KeyeOldestJobOld": [
        ("A job of that priority has waited for long", "max by (priority) (keye_queue_oldest_seconds")
    ],
    "KeyeJobsFail": [("More than a tenth", "> 0.1"), ("more than five in a quarter of an hour", "[15m])) > 5")],
    "KeyeDeadLettersGrow": [("More than a hundred jobs more", "> 100"), ("than an hour ago", "offset 1h")],
    "KeyeQuarantineGrows": [("At 1,000 the oldest are let go", ">= 1000")],
    "KeyeWorkerSick": [("so it takes none", 'state="sick"')],
    "KeyeWorkerHung": [("has not moved", 'state="hung"')],
    "KeyeWorkerRestarts": [("three times", "> 2"), ("in half an hour", "[30m]")],
    "KeyeWorkerGivenUp": [("its GPU is idle now", 'state="given_up"')],
    "KeyeLateRenewals": [("Workers renew their leases so late", "keye_late_renewals_total")],
    "KeyeOutOfMemory": [("again and again", "[30m])) > 5")],
    "KeyeStarvedGpu": [("more than 30 %", "> 0.3"), ("others are queued", "keye_queue_depth)) > 0")],
    "KeyeUnsafeBroker": [("Redis is set so that it may lose jobs", "keye_unsafe_broker")],
    "KeyeLogLinesDropped": [("Lines of a host's log are lost", "keye_log_lines_dropped_total")],
}


@pytest.mark.holds("docs/alerts.md#keyeredisdown", "That host cannot use Redis")
@pytest.mark.holds("docs/alerts.md#keyenoreadyworker", "For ten minutes no worker of any host has taken jobs.")
@pytest.mark.holds("docs/alerts.md#keyedraintoolong", "What waits takes the workers that are ready more than an hour.")
@pytest.mark.holds("docs/alerts.md#keyeoldestjobold", "A job of that priority has waited for long.")
@pytest.mark.holds(
    "docs/alerts.md#keyejobsfail", "More than a tenth of the jobs, and more than five in a quarter of an hour"
)
@pytest.mark.holds(
    "docs/alerts.md#keyedeadlettersgrow", "More than a hundred jobs more are kept as failed than an hour ago"
)
@pytest.mark.holds("docs/alerts.md#keyequarantinegrows", "At 1,000 the oldest are let go")
@pytest.mark.holds("docs/alerts.md#keyeworkersick", "A worker's host fails what every job needs, so it takes none.")
@pytest.mark.holds("docs/alerts.md#keyeworkerhung", "A worker has not moved for 30 seconds.")
@pytest.mark.holds("docs/alerts.md#keyeworkerrestarts", "A worker was started again three times in half an hour.")
@pytest.mark.holds("docs/alerts.md#keyeworkergivenup", "A worker died five times before it was ready")
@pytest.mark.holds("docs/alerts.md#keyelaterenewals", "Workers renew their leases so late")
@pytest.mark.holds("docs/alerts.md#keyeoutofmemory", "Steps do not fit into the GPU's memory again and again.")
@pytest.mark.holds(
    "docs/alerts.md#keyestarvedgpu", "The GPUs of a host could have run another sequence for more than 30 % of the time"
)
@pytest.mark.holds("docs/alerts.md#keyeunsafebroker", "Redis is set so that it may lose jobs")
@pytest.mark.holds("docs/alerts.md#keyeloglinesdropped", "Lines of a host's log are lost")
def test_each_alert_fires_on_what_the_page_says() -> None:
    assert SAID.keys() == RULES.keys() - {"KeyeTargetDown"}
    for alert, pairs in SAID.items():
        rule = " ".join(RULES[alert]["expr"].split())
        for said, made_so in pairs:
            assert said in SECTIONS[alert]
            assert made_so in (rule, RULES[alert].get("for")) or made_so in rule, (alert, said)
    assert f"not moved for {health.HUNG_AFTER_SECONDS:g} seconds" in SECTIONS["KeyeWorkerHung"]
    assert supervisor.MAX_DEATHS_BEFORE_READY == 5
    assert f"and {supervisor.KILL_MARGIN_SECONDS:g} seconds at most" in SECTIONS["KeyeNoReadyWorker"]


@pytest.mark.holds(
    "docs/alerts.md#keyenoreadyworker", "jobs that hang hold them for `KEYE_DRAIN_SECONDS` and 10 seconds at most"
)
@pytest.mark.holds("docs/alerts.md#keyejobsfail", 'The dashboard\'s "Jobs ended" says which code')
@pytest.mark.holds("docs/alerts.md#keyestarvedgpu", '"Room for more while jobs are prepared, by cause" says what')
@pytest.mark.holds(
    "docs/alerts.md#keyeworkerrestarts", "The log says `ended with ...` each time: 13, 17 and 18 are in the table"
)
def test_what_it_says_to_look_at_is_there() -> None:
    titles = set(re.findall(r'"([A-Z][^"]+)"', " ".join(SECTIONS.values())))
    assert titles == {"Jobs ended", "Room for more while jobs are prepared, by cause"} <= PANELS.keys()
    assert "by (outcome, code)" in PANELS["Jobs ended"]
    assert "by (instance, cause)" in PANELS["Room for more while jobs are prepared, by cause"]
    assert [describe(code) for code in (13, 17, 18)] == [
        f"exit code {c:d} ({c.name})" for c in ExitCode if c in (13, 17, 18)
    ]
    assert describe(-9) == "killed by signal 9"
