"""examples/node with the npm package it is written for, in both releases of it: RESP2 and RESP3."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from keye.producer import Client
from tests.acceptance.conftest import ECHO, Start, npm_install
from tests.support.checkout import ROOT

READ_ON = """
import { createClient } from "redis";
import { events } from "./keye.mjs";
const redis = await createClient({ url: process.env.KEYE_REDIS_URL }).connect();
const seen = [];
for await (const event of events(redis, process.argv[2])) seen.push(event);
for await (const event of events(redis, process.argv[2], seen[2].id)) seen.push(event);
console.log(JSON.stringify(seen));
redis.destroy();
"""


@pytest.fixture(scope="module", params=["redis@5", "redis@6"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("node")
    npm_install(folder, request.param)
    for file in (ROOT / "examples" / "node").glob("*.mjs"):
        shutil.copy(file, folder)
    return folder


def node(folder: Path, redis_url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environ = os.environ | {"KEYE_REDIS_URL": redis_url}
    return subprocess.run(["node", *arguments], cwd=folder, env=environ, capture_output=True, text=True, timeout=60)


@pytest.mark.holds("docs/producers.md#from-any-language", "`examples/node/keye.mjs` does all of this")
@pytest.mark.holds("docs/producers.md#from-any-language", "cd examples/node && npm install")
def test_ask_prints_answers_and_failures(folder: Path, start: Start, redis_url: str) -> None:
    start(*ECHO).wait_until_ready()
    answered = node(folder, redis_url, "ask.mjs", "谁在招手")
    assert (answered.returncode, answered.stdout) == (0, "谁在招手\n"), answered.stderr
    assert "[generate, attempt 1]\n" in answered.stderr
    failed = node(folder, redis_url, "ask.mjs", "What is it?", "/nowhere/cat.png")
    assert (failed.returncode, failed.stdout) == (1, "\n")
    assert failed.stderr.splitlines()[-1].startswith("MEDIA_")


def test_events_are_read_on_after_any_of_them(folder: Path, start: Start, client: Client, redis_url: str) -> None:
    start(*ECHO).wait_until_ready()
    job = client.submit(prompt="hello")
    assert job.result(timeout=60).answer == "hello"
    (folder / "read_on.mjs").write_text(READ_ON)
    read = node(folder, redis_url, "read_on.mjs", job.id)
    seen = json.loads(read.stdout)
    num_events = [event["type"] for event in seen].index("ended") + 1
    assert num_events > 3
    assert seen[num_events:] == seen[3:num_events]


def test_a_job_that_is_not_there_is_told(folder: Path, client: Client, redis_url: str) -> None:
    (folder / "read_on.mjs").write_text(READ_ON)
    read = node(folder, redis_url, "read_on.mjs", "no-such-job")
    assert read.returncode == 1
    assert "There is no job no-such-job" in read.stderr
