"""A real Prometheus scrapes a real worker, and the dashboard and the alerts find there what they ask for."""

import json
import re
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from keye.config.job import GenerationOptions
from keye.producer import Client
from tests.acceptance.conftest import Start
from tests.support.checkout import ROOT
from tests.support.conditions import eventually
from tests.support.debian import need
from tests.support.ports import free_port
from tests.support.prometheus import Prometheus

DASHBOARD = json.loads((ROOT / "config/grafana/keye.json").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


@pytest.fixture
def prometheus(start: Start, tmp_path: Path) -> Iterator[Prometheus]:
    """Starts, to scrape a worker that is ready."""
    need("prometheus")
    port = free_port()
    settings = {"KEYE_METRICS_PORT": str(port), "KEYE_CACHE_FOLDER": str(tmp_path / "cache")}
    start("keye.worker.daemon.cli", "run", **settings).wait_until_ready()
    with closing(Prometheus(tmp_path, port)) as prometheus:
        yield prometheus


def test_dashboard_and_alerts_find_what_they_ask_for(prometheus: Prometheus, client: Client, tmp_path: Path) -> None:
    eventually(prometheus.is_up)
    Image.new("RGB", (84, 84), "red").save(tmp_path / "red.png")
    brief = GenerationOptions(max_new_tokens=8)

    def amiss() -> list[Any]:
        # While it is scraped, since rates are of what changed.
        for media in ([], [str(tmp_path / "red.png")]):
            client.submit(prompt="What is this?", media=media, generation=brief).result(timeout=60)
        without_data = [query for query in QUERIES if not set(prometheus.values(query)) - {"NaN"}]
        # Before the first scrape, and after one that a busy machine made late, KeyeTargetDown is pending for a moment.
        return without_data + [rule for rule in prometheus.rules() if rule["health"] != "ok" or rule["alerts"]]

    end = time.monotonic() + 90
    while found := amiss():
        assert time.monotonic() < end, found

    names = set(prometheus.get("label/__name__/values"))
    for rule in prometheus.rules():
        assert set(re.findall(r"\bkeye_\w+", rule["query"])) <= names, rule["name"]
