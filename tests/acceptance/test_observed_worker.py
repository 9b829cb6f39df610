"""What an operator sees of a real worker: probes, /livez and /readyz, metrics, status."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from keye.config.faults import JobFailed
from keye.config.job import GenerationOptions
from keye.producer import Client
from keye.worker.daemon.exit_codes import ExitCode
from tests.acceptance.conftest import SlowStore, Start, Started, is_alive
from tests.support.checkout import PYTHONPATH
from tests.support.conditions import eventually
from tests.support.ports import free_port

RUN = ("keye.worker.daemon.cli", "run")
BRIEF = GenerationOptions(max_new_tokens=8)


class Host:
    """A worker that is watched: all of its state lies below `folder`."""

    def __init__(self, start: Start, folder: Path, **settings: str) -> None:
        self.port = free_port()
        self._environ = {"KEYE_RUN_FOLDER": str(folder / "run"), "KEYE_METRICS_PORT": str(self.port)}
        self.worker: Started = start(*RUN, **self._environ, **settings)

    def probe(self, *options: str) -> int:
        command = [sys.executable, "-m", "keye.worker.daemon.entry", "probe", *options]
        environ = os.environ | self._environ | {"PYTHONPATH": PYTHONPATH}
        return subprocess.run(command, env=environ, capture_output=True).returncode

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
                return answer.status, answer.read().decode()
        except HTTPError as refusal:
            return refusal.code, refusal.read().decode()

    def becomes(self, *, live: bool, ready: bool, within_seconds: float = 20) -> None:
        """By the probe and by HTTP."""

        def is_so() -> bool:
            by_probe = (self.probe() == 0, self.probe("--ready") == 0)
            by_http = (self.get("/livez")[0] == 200, self.get("/readyz")[0] == 200)
            return by_probe == by_http == (live, ready)

        eventually(is_so, within_seconds=within_seconds)

    def value(self, name: str, **labels: str) -> float:
        """The sum of the samples with these labels, 0 where there is none yet."""
        code, text = self.get("/metrics")
        assert code == 200
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())

    def wait_for_endpoint(self) -> None:
        eventually(lambda: "/readyz" in self.worker.log, within_seconds=60)


@pytest.mark.holds("docs/deploy.md#kubernetes", "a worker that loads is live and not ready")
@pytest.mark.holds("docs/alerts.md#keyetargetdown", "If `keye-worker probe` on that host says `live`")
@pytest.mark.holds(
    "docs/operations.md#is-it-up-and-is-it-taking-jobs",
    "keye-worker probe --ready",
    "gives the same two answers of its own workers at `/livez` and `/readyz` (200 or 503)",
    "`loading`: the model is being read",
    "`ready`: jobs are taken.",
    "`draining`: it was told to stop and finishes what it has.",
)
def test_probes_are_right_from_loading_to_the_end_of_the_drain(
    start: Start, client: Client, slow_store: SlowStore, tmp_path: Path
) -> None:
    host = Host(start, tmp_path, KEYE_S3_ENDPOINT_URL=slow_store.url)
    host.wait_for_endpoint()
    host.becomes(live=True, ready=False)
    eventually(lambda: "cpu loading" in host.get("/readyz")[1])
    assert host.get("/elsewhere")[0] == 404
    present = host.worker.wait_until_ready()
    host.becomes(live=True, ready=True)

    job = client.submit(prompt="?", media=["s3://bucket/held.png"], generation=BRIEF)
    eventually(lambda: host.value("keye_running_jobs") == 1, within_seconds=30)
    host.worker.ask_to_end()
    host.becomes(live=True, ready=False)
    assert "draining" in host.get("/livez")[1]
    slow_store.may_go_on.set()
    assert host.worker.exit_code() == ExitCode.OK
    assert job.result(timeout=1).attempts == 1
    assert host.probe() == 1
    assert not is_alive(present.worker.pid)


@pytest.mark.holds("docs/deploy.md#kubernetes", "one that hangs is restarted")
def test_a_worker_that_hangs_is_not_live(start: Start, tmp_path: Path) -> None:
    host = Host(start, tmp_path)
    pid = host.worker.wait_until_ready().worker.pid
    host.becomes(live=True, ready=True)
    os.kill(pid, signal.SIGSTOP)
    try:
        host.becomes(live=False, ready=False, within_seconds=60)
        assert "cpu hung" in host.get("/livez")[1]
        assert host.value("keye_worker_state", worker="cpu", state="hung") == 1
    finally:
        os.kill(pid, signal.SIGCONT)
    host.becomes(live=True, ready=True)


@pytest.mark.holds(
    "docs/design.md#decisions",
    "by name and not by process, so that one that is started again counts on",
)
@pytest.mark.holds(
    "docs/operations.md#what-do-the-metrics-tell",
    "opens `http://127.0.0.1:9464/metrics` on each host",
    "A worker that is started again counts on.",
)
def test_metrics_tell_what_became_of_jobs_also_across_a_death(start: Start, client: Client, tmp_path: Path) -> None:
    host = Host(start, tmp_path, KEYE_LEASE_SECONDS="3")
    first = host.worker.wait_until_ready()
    Image.new("RGB", (120, 90), "teal").save(tmp_path / "picture.png")
    pictures = [client.submit(prompt="?", media=[tmp_path / "picture.png"], generation=BRIEF) for _ in range(3)]
    results = [job.result(timeout=60) for job in pictures]
    with pytest.raises(JobFailed):
        client.submit(prompt="?", media=[str(tmp_path / "gone.png")], generation=BRIEF).result(timeout=60)

    def answered() -> float:
        return host.value("keye_jobs_total", outcome="succeeded", code="")

    eventually(lambda: answered() == 3)
    eventually(lambda: host.value("keye_jobs_total", outcome="failed", code="MEDIA_NOT_FOUND") == 1)
    assert host.value("keye_frames_total") == 3
    assert host.value("keye_generated_tokens_total") == sum(r.usage.completion_tokens for r in results)
    assert host.value("keye_prompt_tokens_total") == sum(r.usage.prompt_tokens for r in results)
    assert host.value("keye_stage_seconds_count", stage="decode") == 3
    assert host.value("keye_time_to_first_token_seconds_count") == 3
    assert host.value("keye_job_seconds_sum") >= sum(r.timings.total for r in results)
    eventually(lambda: host.value("keye_kv_blocks", worker="cpu", state="free") > 0)
    assert host.value("keye_build_info", worker="cpu", model=results[0].model.name) == 1
    assert host.value("keye_decoders", worker="cpu") >= 1
    assert host.value("keye_engine_steps_total") > 0
    assert host.value("keye_redis_up") == 1
    assert host.value("keye_worker_restarts_total", worker="cpu") == 0

    os.kill(first.worker.pid, signal.SIGKILL)
    host.worker.wait_until_ready(other_than=first.worker.pid)
    client.submit(prompt="?", generation=BRIEF).result(timeout=60)
    eventually(lambda: answered() == 4)
    assert host.value("keye_worker_restarts_total", worker="cpu") == 1
    assert host.value("keye_worker_state", worker="cpu", state="ready") == 1


def test_every_end_that_a_worker_writes_is_counted_and_told_once(
    start: Start, client: Client, slow_store: SlowStore, tmp_path: Path
) -> None:
    settings = {"KEYE_CONCURRENCY": "1", "KEYE_LEASE_SECONDS": "3", "KEYE_S3_ENDPOINT_URL": slow_store.url}
    host = Host(start, tmp_path, KEYE_LOG_FORMAT="json", **settings)
    first = host.worker.wait_until_ready()
    held = client.submit(prompt="?", media=["s3://bucket/held.png"], generation=BRIEF, max_attempts=1)
    eventually(lambda: client.status().running == 1)
    late = client.submit(prompt="?", generation=BRIEF, deadline_seconds=1)
    with pytest.raises(JobFailed):
        late.result(timeout=60)
    # Its caller hears of it first.
    eventually(lambda: '"DEADLINE_EXCEEDED"' in host.worker.log)
    os.kill(first.worker.pid, signal.SIGKILL)
    host.worker.wait_until_ready(other_than=first.worker.pid)
    with pytest.raises(JobFailed):
        held.result(timeout=60)
    client.submit(prompt="?", generation=BRIEF).result(timeout=60)

    eventually(lambda: host.value("keye_jobs_total") == 3)
    assert host.value("keye_jobs_total", outcome="succeeded", code="") == 1
    assert host.value("keye_jobs_total", outcome="expired", code="DEADLINE_EXCEEDED") == 1
    assert host.value("keye_jobs_total", outcome="failed", code="WORKER_LOST") == 1
    records = [json.loads(line) for line in host.worker.log.splitlines()]
    told = [(each["job_id"], each["code"]) for each in records if each.get("state") in ("EXPIRED", "FAILED")]
    assert told == [(late.id, "DEADLINE_EXCEEDED"), (held.id, "WORKER_LOST")]


@pytest.mark.holds("docs/alerts.md#keyenoreadyworker", "`keye status` lists them.")
@pytest.mark.holds("docs/operations.md#how-many-jobs-wait-and-how-many-run", "`--json` prints it for programs.")
@pytest.mark.holds(
    "docs/operations.md#is-it-up-and-is-it-taking-jobs",
    "keye-worker status # this host, then the queues, all workers",
)
def test_the_queue_is_told_by_priority_and_in_seconds_of_work(
    start: Start, client: Client, slow_store: SlowStore, tmp_path: Path
) -> None:
    host = Host(start, tmp_path, KEYE_CONCURRENCY="1", KEYE_S3_ENDPOINT_URL=slow_store.url)
    host.worker.wait_until_ready()
    for job in [client.submit(prompt="Hello", generation=BRIEF) for _ in range(5)]:
        job.result(timeout=60)
    eventually(lambda: client.status().work_seconds == 0, within_seconds=10)

    client.submit(prompt="?", media=["s3://bucket/held.png"], generation=BRIEF)
    eventually(lambda: client.status().running == 1)
    for priority in ("high", "low", "low"):
        client.submit(prompt="Hello", generation=BRIEF, priority=priority)
    eventually(lambda: host.value("keye_queue_depth", priority="low") == 2, within_seconds=20)
    assert host.value("keye_queue_depth", priority="high") == 1
    assert host.value("keye_queue_depth", priority="normal") == 0
    assert host.value("keye_running_jobs") == 1
    assert host.value("keye_workers", state="ready") == 1
    assert host.value("keye_work_waiting_seconds") == host.value("keye_drain_seconds") > 0
    command = [sys.executable, "-m", "keye.worker.daemon.cli", "status"]
    environ = os.environ | {"PYTHONPATH": PYTHONPATH, "KEYE_RUN_FOLDER": str(tmp_path / "run")}
    environ["KEYE_REDIS_URL"] = client._settings.redis_url.get_secret_value()
    told = subprocess.run(command, env=environ, cwd="/", capture_output=True, text=True).stdout
    assert re.search(r"^host +cpu ready$", told, re.MULTILINE)
    assert re.search(r"^low +2 queued, the oldest for \d+ s$", told, re.MULTILINE)
    assert re.search(r"^running +1$", told, re.MULTILINE)
    as_json = json.loads(subprocess.run([*command, "--json"], env=environ, cwd="/", capture_output=True).stdout)
    assert as_json["fleet"]["running"] == 1


@pytest.mark.holds("docs/alerts.md#keyetargetdown", "the log's line that the port is taken")
def test_a_port_that_is_taken_is_told_and_jobs_are_answered(start: Start, client: Client, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        worker = start(*RUN, KEYE_RUN_FOLDER=str(tmp_path / "run"), KEYE_METRICS_PORT=str(taken.getsockname()[1]))
        worker.wait_until_ready()
        assert client.submit(prompt="Hello", generation=BRIEF).result(timeout=60).raw_text
        assert "KEYE_METRICS_PORT" in worker.log
