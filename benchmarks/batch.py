"""A batch of very many lines: how quickly they go in, how quickly through, and how much memory that takes."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from redis import Redis

from keye import Client, JobResult
from keye.config import keys
from keye.config.connection import connect
from keye.config.job import Priority
from keye.config.topology import message_list
from keye.testing import MemoryClient
from keye.worker.demo.embedded_valkey import EmbeddedValkey

ROUNDS = 3
NUM_IN, NUM_THROUGH = 40_000, 1_000_000
QUESTION = "What is in the picture?"

# Ends what is queued as settle.lua does, as far as a batch reads that: no model, and no worker, is as quick.
_ANSWER = """
local num = 0
for i = 1, 200 do
  local message = redis.call("RPOP", KEYS[1])
  if not message then break end
  local id = cjson.decode(message).headers.id
  redis.call("HSET", KEYS[4] .. id, "state", "SUCCEEDED", "outcome", (string.gsub(ARGV[1], "JOB%-ID", id)))
  redis.call("EXPIRE", KEYS[4] .. id, 86400)
  redis.call("ZREM", KEYS[2], id)
  redis.call("XADD", KEYS[3], "MAXLEN", "~", 100000, "*", "job_id", id, "state", "SUCCEEDED", "seconds", "0.1")
  num = num + 1
end
return num
"""


def run() -> str:
    with tempfile.TemporaryDirectory() as name, EmbeddedValkey() as broker:
        folder, redis = Path(name), connect(broker.url)
        rates: dict[str, list[float]] = {"`submit_many`": [], "lines of a batch": []}
        source = _lines(folder / "in.jsonl", NUM_IN)
        for number in range(ROUNDS):
            rates["`submit_many`"].append(_submitted(broker.url, source, redis))
            rates["lines of a batch"].append(_sent(broker.url, source, folder / f"out{number}.jsonl", redis))
        source = _lines(folder / "long.jsonl", NUM_THROUGH)
        with _answering(broker.url):
            steps = _through(broker.url, source, folder / "long.out.jsonl")
    base = median(rates["`submit_many`"])
    table = ["| | a second, of each round | ratio |", "|---|---|---|"]
    for what, of_each in rates.items():
        table.append(f"| {what} | {', '.join(f'{rate:,.0f}' for rate in of_each)} | {median(of_each) / base:.2f} |")
    parts = [next(step for step in steps if step[0] >= part * steps[-1][0]) for part in (0.1, 0.25, 0.5, 0.75, 1)]
    table += ["", f"| of {NUM_THROUGH:,} lines | a tenth | a quarter | half | three quarters | all |"]
    table += ["|---|---|---|---|---|---|", "| seconds |" + "".join(f" {seconds:.0f} |" for _, seconds, _ in parts)]
    table.append("| peak resident MiB of the runner |" + "".join(f" {peak:.0f} |" for _, _, peak in parts))
    return "\n".join([*table, ""])


def _lines(path: Path, number: int) -> Path:
    with path.open("w") as file:
        for i in range(number):
            line = {"custom_id": f"photo-{i}", "prompt": QUESTION, "media": [f"/data/pictures/{i}.jpg"]}
            file.write(json.dumps(line) + "\n")
    return path


def _submitted(url: str, source: Path, redis: Redis) -> float:
    redis.flushdb()
    with Client(url) as client, source.open() as lines:
        began = time.perf_counter()
        client.submit_many({k: v for k, v in json.loads(line).items() if k != "custom_id"} for line in lines)
        return NUM_IN / (time.perf_counter() - began)


def _sent(url: str, source: Path, output: Path, redis: Redis) -> float:
    redis.flushdb()
    with Client(url) as client:
        began = time.perf_counter()
        batch = client.submit_batch(source, output, max_in_flight=NUM_IN)
        while batch.progress.in_flight < NUM_IN:
            time.sleep(0.02)
        return NUM_IN / (time.perf_counter() - began)


@contextmanager
def _answering(url: str) -> Iterator[None]:
    answering = subprocess.Popen([sys.executable, "-m", "benchmarks.batch", url])
    try:
        yield
    finally:
        answering.kill()
        answering.wait()


def answer_all(url: str) -> None:
    redis = connect(url)
    with MemoryClient(lambda job: "A cat on a mat, and a dog that would rather be there itself.") as client:
        outcome: JobResult = client.submit(prompt=QUESTION).result()
    outcome_json = outcome.model_copy(update={"job_id": "JOB-ID"}).model_dump_json()
    answer = redis.register_script(_ANSWER)
    names = [message_list(Priority.LOW), keys.queued("low"), keys.ENDED, keys.record("")]
    while True:
        if not answer(names, [outcome_json]):
            time.sleep(0.01)


def _through(url: str, source: Path, output: Path) -> list[tuple[int, float, float]]:
    """Bytes of answers, seconds, and the runner's peak of resident MiB, again and again until it ends."""
    command = [sys.executable, "-m", "keye", "batch", "run", str(source), "-o", str(output), "--redis-url", url]
    began = time.perf_counter()
    runner = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    steps = [(0, 0.0, 0.0)]
    # A zombie has no memory to tell of.
    while peak := Path(f"/proc/{runner.pid}/status").read_text().partition("VmHWM:")[2].split():
        size = output.stat().st_size if output.exists() else 0
        steps.append((size, time.perf_counter() - began, int(peak[0]) / 1024))
        time.sleep(0.2)
    if runner.wait():
        raise RuntimeError(f"the batch ended with {runner.returncode}")
    return steps


if __name__ == "__main__":
    answer_all(sys.argv[1])
