"""`keye top` in a terminal of 60 columns and 20 rows, and where there is none."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from redis import Redis
from typer.testing import CliRunner

from keye.config import keys
from keye.config.event import TextGenerated
from keye.config.outcome import ModelIdentity, WorkerIdentity
from keye.config.presence import EngineUse, Presence, StarvedSeconds, WorkerState
from keye.producer import Client, Job
from keye.producer.cli import app
from keye.producer.shell import ExitCode
from keye.producer.top import INTERVAL_SECONDS
from tests.chaos.echo_workers import EchoWorkers
from tests.support.checkout import PYTHONPATH
from tests.support.conditions import eventually
from tests.support.redis_server import RedisServer
from tests.support.terminal import KEYE, Terminal, wait_until_shown
from tests.support.worker_side import start

TOP = (*KEYE, "top", "--interval", "0.2")
WORKER = "gpu-host-1:4711"


def environ_of(url: str) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("KEYE_", "COLUMNS", "LINES"))}
    return {**own, "PYTHONPATH": PYTHONPATH, "KEYE_REDIS_URL": url}


@pytest.fixture
def environ(redis_url: str) -> dict[str, str]:
    return environ_of(redis_url)


def a_worker(
    redis: Redis, pid: int = 4711, state: WorkerState = WorkerState.READY, sickness: str = "", later: float = 0
) -> None:
    """As it tells of itself `later` seconds later, half of which it waited for media."""
    use = EngineUse(
        running=16,
        max_running=64,
        seconds=3600 + later,
        starved_seconds=StarvedSeconds(fetch=3 + later / 2, decode=41),
        kv_blocks_used=43,
        num_kv_blocks=100,
    )
    present = Presence(
        worker=WorkerIdentity(host="gpu-host-1", pid=pid, device="NVIDIA H100 80GB HBM3"),
        state=state,
        model=ModelIdentity(name="Keye-VL-8B-Preview", model_type="Keye", precision="bfloat16"),
        engine=use,
        sickness=sickness,
    )
    redis.set(keys.worker("gpu-host-1", pid), present.model_dump_json(), ex=20)


def run_for(redis: Redis, job: Job, seconds: float, num_tokens: int) -> None:
    start(redis, job)
    redis.zrem(keys.queued("normal"), job.id)
    redis.hset(keys.record(job.id), mapping={"claimed_at": time.time() - seconds, "worker": WORKER})
    event = TextGenerated(channel="answer", text="a", offset=0, num_tokens=num_tokens, attempt=1, at=1)
    redis.xadd(keys.events(job.id), {"event": event.model_dump_json()})


@pytest.mark.holds(
    "docs/operations.md#how-many-jobs-wait-and-how-many-run",
    "`keye top` shows the same in a terminal, every 2 s (`--interval`)",
    "Ctrl-C or q ends it.",
)
@pytest.mark.parametrize("key", ["q", "\x03"], ids=["q", "Ctrl-C"])
def test_a_small_terminal_shows_queues_workers_and_the_longest_jobs(
    environ: dict[str, str], client: Client, redis: Redis, key: str
) -> None:
    a_worker(redis)
    jobs = [client.submit(prompt="?") for _ in range(30)]
    for number, job in enumerate(jobs[:20]):
        run_for(redis, job, seconds=60 * (number + 2), num_tokens=number)
    with Terminal(TOP, environ) as terminal:
        wait_until_shown(terminal, "tokens")
        shown = terminal.screen
        terminal.type(key)
        assert terminal.ended() == ExitCode.OK
        eventually(terminal.is_as_before)
    assert INTERVAL_SECONDS == 2
    assert re.search("\x1b\\[[0-9;]*[34][0-9]", terminal.said) is None, "no colours"
    assert len(shown) == 20
    assert max(map(len, shown)) <= 60
    lines = [line.rstrip() for line in shown]
    lines[2] = re.sub(r"\d+ s$", "0 s", lines[2])
    assert lines[1:12] == [
        "high    0 queued",
        "normal  10 queued, the oldest for 0 s",
        "low     0 queued",
        "running 20",
        "work    not known before some jobs have been answered",
        "failed  0 (keye dead list)",
        "worker  gpu-host-1:4711 ready on NVIDIA H100 80GB HBM3,",
        "        Keye-VL-8B-Preview in bfloat16",
        "        16 of 64 sequences run, 43% of the KV cache is used;",
        "        of 3600 s the engine waited 41 s for decoders, 3 s",
        "        for media",
    ]
    assert lines[13].startswith(f"{jobs[19].id} generate  21m     19")
    assert lines[14].startswith(f"{jobs[18].id} generate  20m     18")
    assert lines[-1] == "job     and 14 more"


@pytest.mark.holds(
    "docs/operations.md#how-many-jobs-wait-and-how-many-run", "What engines waited for is told of the last minute."
)
def test_what_engines_wait_for_is_told_of_now(environ: dict[str, str], redis: Redis) -> None:
    a_worker(redis)
    with Terminal(TOP, environ, columns=100) as terminal:
        wait_until_shown(terminal, "of 3600 s the engine waited 41 s for")
        a_worker(redis, later=10)
        wait_until_shown(terminal, "of 10 s the engine waited 5 s for")


@pytest.mark.holds(
    "docs/operations.md#how-many-jobs-wait-and-how-many-run",
    "60 columns and 20 rows are enough: where not every worker has room, they are added up",
)
def test_what_ails_and_all_workers_together_are_told_where_not_each_has_room(
    environ: dict[str, str], redis: Redis
) -> None:
    for pid in range(9):
        a_worker(redis, pid)
    a_worker(redis, 9, WorkerState.SICK, "No space left on device")
    with Terminal(TOP, environ) as terminal:
        wait_until_shown(terminal, "160 of 640 sequences")
        lines = terminal.screen
        terminal.resize(120, 50)
        eventually(lambda: len(terminal.screen) > 30)
        assert terminal.shows("gpu-host-1:8 ready on NVIDIA H100 80GB HBM3, Keye-VL-8B-Preview in bfloat16")
    assert len(lines) <= 20
    assert "worker  gpu-host-1:9 sick 16/64 KV 43% No space left on" in "\n".join(lines)
    assert "decoders, 30 s for media" in " ".join(" ".join(lines).split())


@pytest.mark.holds(
    "docs/operations.md#how-many-jobs-wait-and-how-many-run",
    "A Redis that goes away is told of above what was seen last, until it is back.",
)
def test_a_redis_that_goes_away_is_told_of_and_comes_back(tmp_path: Path) -> None:
    with (
        RedisServer(tmp_path / "redis") as server,
        Client(server.url) as client,
        Terminal(TOP, environ_of(server.url)) as terminal,
    ):
        wait_until_shown(terminal, "normal  0 queued")
        server.kill()
        wait_until_shown(terminal, "Redis could not be read")
        wait_until_shown(terminal, "normal  0 queued")
        server.start()
        client.submit(prompt="?")
        wait_until_shown(terminal, "normal  1 queued")
        assert not terminal.shows("Redis could not be read")
        terminal.process.terminate()
        assert terminal.ended() == 128 + signal.SIGTERM
        eventually(terminal.is_as_before)


@pytest.mark.holds(
    "docs/operations.md#how-many-jobs-wait-and-how-many-run", "Where there is no terminal one frame is printed"
)
def test_one_frame_is_printed_where_there_is_no_terminal(environ: dict[str, str], client: Client, redis: Redis) -> None:
    a_worker(redis)
    run_for(redis, client.submit(prompt="?"), 5, 7)
    told = subprocess.run((*KEYE, "top"), env=environ, capture_output=True, text=True, check=True)
    assert "\x1b" not in told.stdout
    assert "        16 of 64 sequences run, 43% of the KV cache is used; of 3600 s" in told.stdout
    assert told.stdout.splitlines()[-1].endswith(f"      7 {WORKER}")
    as_json = subprocess.run((*KEYE, "top", "--json"), env=environ, capture_output=True, text=True, check=True)
    (frame,) = map(json.loads, as_json.stdout.splitlines())
    assert (frame["running"], frame["jobs"][0]["num_tokens"], frame["jobs"][0]["stage"]) == (1, 7, "generate")
    assert frame.keys() > json.loads(client.status().model_dump_json()).keys()
    with Terminal((*KEYE, "top", "--once"), environ) as terminal:
        assert terminal.ended() == ExitCode.OK
        eventually(lambda: "running 1" in terminal.said)
    assert "\x1b[?1049h" not in terminal.said


@pytest.mark.holds(
    "docs/operations.md#how-many-jobs-wait-and-how-many-run",
    "with `--interval` one after another, with `--json` a line each",
)
def test_frames_follow_one_another_as_lines_of_json(environ: dict[str, str], client: Client, redis: Redis) -> None:
    with subprocess.Popen((*TOP, "--json"), env=environ, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["queues"][1]["depth"] == 0
        client.submit(prompt="?")
        eventually(lambda: json.loads(process.stdout.readline())["queues"][1]["depth"] == 1)  # type: ignore[union-attr]
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert process.wait(30) == ExitCode.OK


def test_what_a_worker_runs_is_seen_as_it_writes(
    environ: dict[str, str], redis_url: str, client: Client, redis: Redis, tmp_path: Path
) -> None:
    workers = EchoWorkers(redis_url, redis, tmp_path, lease_seconds=3)
    try:
        (worker,) = workers.start_ready()
        job = client.submit(prompt=f"write {tmp_path / 'go-on'}")
        with Terminal(TOP, environ, columns=100) as terminal:
            eventually(lambda: terminal.shows(f"{job.id} generate") and terminal.shows(f"1 {worker.name}"))
            wait_until_shown(terminal, "1 of 1000 sequences run")
            seen = CliRunner().invoke(app, ["status", job.id, "--redis-url", redis_url]).stdout
            assert "stage   generate, attempt 1\ntokens  1\n" in seen
            assert f"worker  {worker.name}\n" in seen
            (tmp_path / "go-on").touch()
            eventually(lambda: not terminal.shows(job.id))
            wait_until_shown(terminal, "running 0")
    finally:
        workers.end()
