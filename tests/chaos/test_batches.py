"""`keye batch run` and its workers are killed again and again: every line of the input ends once, and soon."""

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from keye.config import keys
from keye.producer import Client
from keye.producer.shell import ExitCode
from tests.chaos.broker import Broker
from tests.chaos.conftest import Gate
from tests.chaos.echo_workers import EchoWorkers
from tests.chaos.ledger import assert_each_ended_once, assert_nothing_is_left
from tests.support.checkout import PYTHONPATH
from tests.support.scale import SCALE

MAX_RESUME_SECONDS = 5.0


class Lines:
    """Of a manifest: ours, OpenAI's, some of which fail, some that cannot be read, some with another's custom_id."""

    def __init__(self, number: int, draw: random.Random) -> None:
        self.texts: list[str] = []
        # By custom_id; and the numbers of those that fail.
        self.answers: dict[str, str] = {}
        self.failing: set[int] = set()
        # Of those that workers run.
        self.num_jobs = 0
        for each in range(1, number + 1):
            self.texts.append(self._line(each, draw.random(), draw))

    def _line(self, number: int, chance: float, draw: random.Random) -> str:
        custom_id, prompt = f"c{number}", f"say {number}"
        # Who loses worker after worker is given up by and by, which is none of a batch's doing.
        job: dict[str, Any] = {"max_attempts": 10}
        if chance < 0.02:
            self.failing.add(number)
            return f'{{"custom_id": "{custom_id}", "prompt": '
        if chance < 0.04 and self.answers:
            self.failing.add(number)
            custom_id = draw.choice(list(self.answers))
        else:
            self.num_jobs += 1
            if chance < 0.06:
                self.failing.add(number)
                job["media"] = ["/is/nowhere.png"]
            else:
                self.answers[custom_id] = prompt
        if chance > 0.8:
            body = {"model": "keye", "messages": [{"role": "user", "content": prompt}], **job}
            return json.dumps({"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body})
        return json.dumps({"custom_id": custom_id, "prompt": prompt, **job})


class Runner:
    """The command, which is begun again where it was killed; looks how many lines have ended meanwhile."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder = folder
        run = ["batch", "run", "in.jsonl", "-o", "out.jsonl", "--json", "--redis-url", url]
        self._command = [sys.executable, "-m", "keye", *run]
        self._environ = os.environ | {"PYTHONPATH": PYTHONPATH}
        self.longest_resume_seconds = 0.0

    def begin(self) -> None:
        self._began_at = time.monotonic()
        self._had = self.num_bytes
        with (self.folder / "runner.log").open("ab") as log:
            self.process = subprocess.Popen(self._command, cwd=self.folder, env=self._environ, stdout=log, stderr=log)

    @property
    def outputs(self) -> list[Path]:
        return [path for name in ("out.jsonl", "out.errors.jsonl") if (path := self.folder / name).exists()]

    @property
    def num_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.outputs)

    @property
    def num_lines(self) -> int:
        return sum(path.read_bytes().count(b"\n") for path in self.outputs)

    def wait_until_it_goes_on(self) -> None:
        while self.process.poll() is None and self.num_bytes <= self._had:
            time.sleep(0.01)
        self.longest_resume_seconds = max(self.longest_resume_seconds, time.monotonic() - self._began_at)

    def lines(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """What stands in both files by now, with the number of its line in the input."""
        for path in self.outputs:
            for text in path.read_text().splitlines():
                line = json.loads(text)
                yield line.get("line") or int(line["response"]["request_id"].split(".")[1]), line


def answer_of(line: dict[str, Any]) -> str | None:
    if response := line.get("response"):
        return response["body"]["choices"][0]["message"]["content"] if response["status_code"] == 200 else None
    return line.get("answer")


@pytest.mark.holds(
    "docs/batches.md#what-if-something-dies",
    "who | then",
)
@pytest.mark.holds(
    "docs/collect-many-results.md#in-a-file-and-after-whatever-dies",
    "A batch reads its jobs from a file",
)
@pytest.mark.holds(
    "docs/producers.md#many-jobs",
    "`client.submit_batch(source, output)` runs",
)
def test_every_line_ends_once_whoever_is_killed(
    broker: Broker, client: Client, workers: EchoWorkers, tmp_path: Path, gate: Gate, lease_seconds: float
) -> None:
    draw = random.Random(seed := time.time_ns())
    print("seed", seed)
    lines = Lines(SCALE.num_batch_lines, draw)
    (tmp_path / "in.jsonl").write_text("".join(f"{text}\n" for text in lines.texts))
    num_lines = len(lines.texts)
    kills = [(draw.randrange(num_lines), who) for who in ("runner", "worker") for _ in range(SCALE.num_batch_kills)]
    alive = workers.start_ready(2)
    runner = Runner(tmp_path, broker.url)
    began_at = time.monotonic()
    runner.begin()
    num_held = 0
    for when, who in sorted(kills):
        while runner.process.poll() is None and runner.num_lines < when:
            time.sleep(0.01)
        if who == "worker":
            num_held += len(alive.pop(0).kill())
            alive.append(workers.start())
        else:
            runner.process.kill()
            runner.process.wait()
            runner.begin()
            runner.wait_until_it_goes_on()
    code = runner.process.wait(timeout=300)
    seconds = time.monotonic() - began_at

    gate(f"{num_lines} lines, runner and worker killed {SCALE.num_batch_kills} times each", f"{seconds:.0f} s", "")
    longest = runner.longest_resume_seconds
    gate("from its start until a killed runner goes on", f"{longest:.1f} s", f"{MAX_RESUME_SECONDS:.0f} s")
    log = (tmp_path / "runner.log").read_text()
    assert code == ExitCode.JOB_FAILED, log
    counts = {"total": num_lines, "completed": len(lines.answers), "failed": len(lines.failing)}
    # Behind them it may say that all had ended before.
    *_, told = (line for line in log.splitlines() if line.startswith("{"))
    assert json.loads(told)["request_counts"] == counts
    found = list(runner.lines())
    assert Counter(number for number, _ in found) == Counter(range(1, num_lines + 1))
    answers = [(line["custom_id"], answer) for _, line in found if (answer := answer_of(line)) is not None]
    assert len(answers) == len(lines.answers)
    assert dict(answers) == lines.answers
    assert {number for number, line in found if answer_of(line) is None} == lines.failing
    # Nothing ran but what was asked, and nothing again but for whoever died with it.
    records = broker.redis.scan_iter(keys.record("*"), _type="hash")
    jobs = [client.job(name.removeprefix(keys.record(""))) for name in records]
    assert len(jobs) == lines.num_jobs
    attempts = [int(record["attempts"]) for record in assert_each_ended_once(broker.redis, jobs).values()]
    assert sum(attempts) == len(jobs) + num_held
    assert_nothing_is_left(client, broker.redis, lease_seconds)
    assert longest < MAX_RESUME_SECONDS
