"""Debian's Prometheus, as docker-compose.yml starts it for the workers' metrics and alerts."""

import json
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import yaml

from tests.support.checkout import ROOT
from tests.support.debian import need
from tests.support.ports import free_port

CONFIG = ROOT / "config/prometheus"
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())


class Prometheus:
    """With the configuration that ships, but for where the workers are and how often it asks."""

    def __init__(self, folder: Path, *worker_ports: int) -> None:
        config = yaml.safe_load((CONFIG / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["rule_files"] = [str(CONFIG / name) for name in config["rule_files"]]
        (job,) = config["scrape_configs"]
        (there,) = job.pop("dns_sd_configs")
        worker = COMPOSE["x-worker"]
        assert there["names"] == worker["networks"]["default"]["aliases"]
        assert str(there["port"]) == worker["environment"]["KEYE_METRICS_PORT"]
        job["static_configs"] = [{"targets": [f"127.0.0.1:{port}" for port in worker_ports]}]
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

    def close(self) -> None:
        self.process.kill()
        self.process.wait()

    def get(self, path: str, **parameters: str) -> Any:
        with urlopen(f"{self._url}/api/v1/{path}?{urlencode(parameters)}", timeout=30) as answer:
            return json.load(answer)["data"]

    def values(self, query: str) -> list[str]:
        found = self.get("query", query=query.replace("$__rate_interval", "60s"))["result"]
        return [sample["value"][1] for sample in found]

    def rules(self) -> list[dict[str, Any]]:
        return [rule for group in self.get("rules")["groups"] for rule in group["rules"]]
