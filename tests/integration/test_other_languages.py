"""The Node producer of examples/node without the npm package, against a real server and a real Celery worker."""

import os
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.contrib.testing.worker import start_worker
from redis import Redis

from keye.config import keys
from keye.config.topology import ANALYZE_TASK, PRIORITY_STEPS, QUEUE
from keye.config.wire import open_sealed
from keye.producer import Client, JobState
from tests.support.checkout import ROOT

PRODUCER = ROOT / "examples" / "node" / "keye.mjs"

# Just enough of a Redis client: RESP2 over a socket, one command at a time.
NODE_CLIENT = r"""
import { connect } from "node:net";

class Incomplete extends Error {}

function parse(text, at) {
  const end = text.indexOf("\r\n", at);
  if (end < 0) throw new Incomplete();
  const [kind, head] = [text[at], text.slice(at + 1, end)];
  let next = end + 2;
  if (kind === "+" || kind === ":") return [head, next];
  if (kind === "-") throw new Error(head);
  if (head === "-1") return [null, next];
  if (kind === "$") {
    if (text.length < next + Number(head) + 2) throw new Incomplete();
    return [text.slice(next, next + Number(head)), next + Number(head) + 2];
  }
  const items = [];
  for (let i = 0; i < Number(head); i++) {
    const [item, after] = parse(text, next);
    items.push(item);
    next = after;
  }
  return [items, next];
}

const place = new URL(process.env.KEYE_REDIS_URL);
const socket = connect(Number(place.port), place.hostname).setEncoding("latin1");
const redis = {
  sendCommand: (words) => new Promise((resolve, reject) => {
    let text = "";
    socket.removeAllListeners("data").on("data", (chunk) => {
      text += chunk;
      try { resolve(parse(text, 0)[0]); } catch (error) { if (!(error instanceof Incomplete)) reject(error); }
    });
    socket.write(`*${words.length}\r\n` + words.map((w) => `$${Buffer.byteLength(w)}\r\n${w}\r\n`).join(""));
  }),
};
await redis.sendCommand(["AUTH", place.password]);
"""


@pytest.mark.holds(
    "docs/producers.md#from-any-language",
    "It is Celery's, as `submit` writes it.",
    "every name above of a key or a channel begins with it",
    "`keye.mjs` reads that variable.",
)
@pytest.mark.skipif(shutil.which("node") is None, reason="Node is not installed")
@pytest.mark.parametrize(
    ("priority", "streams", "prefix"),
    [
        ("high", "pairs", ""),
        ("normal", "Object.fromEntries(pairs)", ""),
        ("low", "pairs", ""),
        ("normal", "pairs", "blue:"),
    ],
)
def test_a_job_sent_from_node_reaches_a_worker_and_its_outcome_comes_back(
    redis: Redis, redis_url: str, tmp_path: Path, priority: str, streams: str, prefix: str
) -> None:
    program = tmp_path / "producer.mjs"
    program.write_text(
        f'import {{ outcome, submit }} from "{PRODUCER}"; {NODE_CLIENT}'
        "const client = { sendCommand: async (words) => { const pairs = await redis.sendCommand(words);"
        f'return words[0] === "XREAD" && pairs ? {streams} : pairs; }} }};'
        f'const id = await submit(redis, {{ prompt: "谁在招手", priority: "{priority}", deadline_seconds: 60 }});'
        "console.log(id); console.log((await outcome(client, id)).kind); socket.end();"
    )
    received: list[Any] = []
    arrived = threading.Event()
    app = Celery("worker", set_as_current=False)
    app.conf.update(
        broker_url=redis_url,
        result_backend=redis_url,
        task_default_queue=QUEUE,
        broker_transport_options={"priority_steps": sorted(PRIORITY_STEPS.values()), "global_keyprefix": prefix},
    )

    # The worker's own task is shared with every app, once another test has imported it.
    app.finalize()
    app.tasks.pop(ANALYZE_TASK, None)

    @app.task(name=ANALYZE_TASK, shared=False)
    def analyze(sealed: Any) -> None:
        received.append(sealed)
        arrived.set()

    environ = os.environ | {"KEYE_KEY_PREFIX": prefix, "KEYE_REDIS_URL": redis_url}
    with (
        start_worker(
            app, pool="threads", concurrency=1, perform_ping_check=False, shutdown_timeout=20, loglevel="warning"
        ),
        Client(redis_url, key_prefix=prefix) as client,
        subprocess.Popen(["node", program], stdout=subprocess.PIPE, text=True, env=environ) as node,
    ):
        assert node.stdout is not None
        job = client.find(node.stdout.readline().strip())
        assert arrived.wait(20)
        sealed = open_sealed(received[0])
        assert sealed.job_id == job.id
        assert sealed.job.prompt == "谁在招手"
        assert float(redis.hget(prefix + keys.record(job.id), "deadline_at")) == pytest.approx(sealed.submitted_at + 60)
        # Any outcome will do: cancelling writes one.
        job.cancel()
        assert node.stdout.read() == "failure\n"
        assert job.state is JobState.CANCELLED
