"""A real Prometheus scrapes a real worker, and the dashboard and the alerts find there what they ask for."""

import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
import yaml
from PIL import Image

from keye.config.job import GenerationOptions
from keye.producer import Client
from tests.acceptance.conftest import Start
from tests.support.checkout import ROOT
from tests.support.conditions import eventually
from tests.support.debian import need
from tests.support.ports import free_port

CONFIG = ROOT / "config/prometheus"
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
DASHBOARD = json.loads((ROOT / "config/grafana/keye.json").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


class Prometheus:
    """With the configuration that ships, but for where the workers are and how often it asks."""

    def __init__(self, folder: Path, worker_port: int) -> None:
        config = yaml.safe_load((CONFIG / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["rule_files"] = [str(CONFIG / name) for name in config["rule_files"]]
        (job,) = config["scrape_configs"]
        (there,) = job.pop("dns_sd_configs")
        worker = COMPOSE["x-worker"]
        assert there["names"] == worker["networks"]["default"]["aliases"]
        assert str(there["port"]) == worker["environment"]["KEYE_METRICS_PORT"]
        job["static_configs"] = [{"targets": [f"127.0.0.1:{worker_port}"]}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        port = free_port()
        self._url = f"http://127.0.0.1:{port}"
        options = [f"--web.listen-address=127.0.0.1:{port}", f"--storage.tsdb.path={folder / 'data'}"]
        with (folder / "prometheus.log").open("wb") as log:
            command = [need("prometheus"), f"--config.file={folder / 'prometheus.yml'}", *options]
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    def is_up(self) -> bool:
        assert self.process.poll() is None
        try:
            return bool(urlopen(f"{self._url}/-/ready", timeout=5).status == 200)
        except OSError:
            return False

    def get(self, path: str, **parameters: str) -> Any:
        with urlopen(f"{self._url}/api/v1/{path}?{urlencode(parameters)}", timeout=30) as answer:
            return json.load(answer)["data"]

    def values(self, query: str) -> list[str]:
        found = self.get("query", query=query.replace("$__rate_interval", "60s"))["result"]
        return [sample["value"][1] for sample in found]

    def rules(self) -> list[dict[str, Any]]:
        return [rule for group in self.get("rules")["groups"] for rule in group["rules"]]


@pytest.fixture
def prometheus(start: Start, tmp_path: Path) -> Iterator[Prometheus]:
    """Starts, to scrape a worker that is ready."""
    need("prometheus")
    port = free_port()
    settings = {"KEYE_METRICS_PORT": str(port), "KEYE_CACHE_FOLDER": str(tmp_path / "cache")}
    start("keye.worker.daemon.cli", "run", **settings).wait_until_ready()
    prometheus = Prometheus(tmp_path, port)
    yield prometheus
    prometheus.process.kill()
    prometheus.process.wait()


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
