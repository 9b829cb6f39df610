"""The release before beside today's, as while a fleet is upgraded: real workers, each with the other's producer."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from redis import Redis

from keye.config import keys
from keye.config.job import AnalysisJob, Priority
from keye.config.topology import PRIORITY_STEPS, QUEUE, body_of, message, message_around, message_list
from keye.config.wire import SCHEMA_VERSION, schemas, seal
from keye.worker.demo.local_worker import LocalWorker
from keye.worker.demo.scenes import draw_image_scene
from tests.compat.release import TAG, unpack_release
from tests.support.checkout import PYTHONPATH
from tests.support.conditions import eventually

# Runs under either release: what a backend does with the producer, told as JSON.
SCENARIO = """
import json, sys
from keye.producer import Client, ImagePart, JobFailed, StageStarted, TextGenerated

url, picture, question = sys.argv[1:]
with Client(url) as client:
    asked = dict(media=[ImagePart(uri=picture)], prompt=question, generation={"temperature": 0}, metadata={"order": 7})
    job = client.submit(**asked)
    events = list(job.events(timeout=60))
    result = job.result(timeout=60)
    many = client.submit_many([asked, {"prompt": ""}])
    others = [many[0].result(timeout=60).answer, type(many[1]).__name__]
    lost = client.submit(media=[ImagePart(uri=picture + ".png")], prompt=question)
    try:
        lost.result(timeout=60)
    except JobFailed as failed:
        failure = failed.failure
    dropped = client.submit(prompt=question, deadline_seconds=50)
    dropped.cancel()
    list(dropped.events(timeout=60))
    letters = [letter.job_id for letter in client.dead_letters.select()]
    found = client.verify()[1]
print(json.dumps({
    "from": sys.modules[Client.__module__].__file__,
    "answer": result.answer,
    "streamed": "".join(e.text for e in events if isinstance(e, TextGenerated) and e.channel == "answer"),
    "stages": [e.stage.value for e in events if isinstance(e, StageStarted)],
    "last": events[-1].state.value,
    "attention": getattr(result.model, "attention", None),
    "seen": [medium.visual_tokens for medium in result.media],
    "metadata": result.metadata,
    "others": others,
    "failure": [failure.code.value, failure.stage.value, failure.media_index],
    "is_dead_letter": letters == [lost.id],
    "dropped": dropped.state.value,
    "irregular": [str(each) for each in found],
}))
"""


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        return unpack_release(tmp_path_factory.mktemp(TAG))
    except LookupError as reason:
        pytest.skip(str(reason))


def run(script: str, *arguments: str, packages: Path | None, folder: Path) -> Any:
    """What the script prints as JSON, run by the release in `packages`, or by today's."""
    environment = dict(os.environ)
    if packages:
        environment["PYTHONPATH"] = str(packages)
    command = [sys.executable, "-c", script, *arguments]
    ran = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=100)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@pytest.fixture
def ask(redis_url: str, tmp_path: Path) -> Callable[[Path | None], tuple[Any, str]]:
    """Plays the scenario with a producer of either release; also gives the answer that is right."""
    scene = draw_image_scene(np.random.default_rng(3))
    picture = tmp_path / "shapes.png"
    scene.image.save(picture)

    def play(packages: Path | None) -> tuple[Any, str]:
        arguments = (redis_url, str(picture), scene.questions[0].text)
        told = run(SCENARIO, *arguments, packages=packages, folder=tmp_path)
        assert Path(told["from"]).is_relative_to(packages or Path(__file__).parents[2])
        return told, scene.questions[0].reply("auto")

    return play


def works(told: Any, answer: str) -> None:
    assert told["answer"] == told["streamed"] == told["others"][0]
    assert told["answer"] in answer
    assert told["stages"] == ["open", "fetch", "decode", "prepare", "generate"]
    assert told["last"] == "SUCCEEDED"
    assert told["seen"][0] > 0
    assert told["metadata"] == {"order": 7}
    assert told["others"][1] == "InvalidJob"
    assert told["failure"] == ["MEDIA_NOT_FOUND", "fetch", 0]
    assert told["is_dead_letter"]
    assert told["dropped"] in ("CANCELLED", "SUCCEEDED"), "it may be answered before it is cancelled"
    assert told["irregular"] == []


@pytest.mark.holds(
    "docs/operations.md#how-do-i-upgrade-a-fleet",
    "workers and producers of neighbouring releases understand each other",
    "Jobs that do not use anything new run on any worker.",
)
def test_producer_of_the_release_before_is_served_by_todays_worker(
    released: Path, ask: Callable[..., tuple[Any, str]], redis: Redis, redis_url: str, tmp_path: Path
) -> None:
    with LocalWorker(redis_url, tmp_path / "worker.log", {"KEYE_MEDIA_ROOTS": str(tmp_path)}):
        works(*ask(released))
        job_id = send_newer(redis)
        eventually(lambda: redis.hget(keys.record(job_id), "left_seconds"))
        assert redis.hget(keys.record(job_id), "state") == "QUEUED"


@pytest.mark.holds("docs/operations.md#how-do-i-upgrade-a-fleet", "`tests/compat` runs each beside the other")
def test_todays_producer_is_served_by_a_worker_of_the_release_before(
    released: Path, ask: Callable[..., tuple[Any, str]], redis: Redis, redis_url: str, tmp_path: Path
) -> None:
    settings = {"KEYE_MEDIA_ROOTS": str(tmp_path), "PYTHONPATH": str(released)}
    with LocalWorker(redis_url, tmp_path / "worker.log", settings):
        told, answer = ask(None)
        works(told, answer)
        assert told["attention"] is None, "the worker is of today"


def test_a_key_used_with_one_release_is_the_same_jobs_with_the_other(
    released: Path, redis: Redis, redis_url: str, tmp_path: Path
) -> None:
    script = (
        "import json, sys; from keye.producer import Client; "
        "print(json.dumps(Client(sys.argv[1]).submit(prompt='?', idempotency_key=sys.argv[2]).id))"
    )
    for key, packages, other in (("then", released, None), ("now", None, released)):
        first = run(script, redis_url, key, packages=packages, folder=tmp_path)
        assert run(script, redis_url, key, packages=other, folder=tmp_path) == first


def test_a_job_that_the_release_before_cancels_in_the_queue_is_kept_for_as_long_as_workers_say(
    released: Path, redis: Redis, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEYE_RESULT_TTL_SECONDS", "600")
    script = (
        "import json, sys; from keye.producer import Client; job = Client(sys.argv[1]).submit(prompt='?'); "
        "job.cancel(); print(json.dumps(job.id))"
    )
    job_id = run(script, redis_url, packages=released, folder=tmp_path)
    assert 0 < redis.ttl(keys.record(job_id)) <= 600
    with LocalWorker(redis_url, tmp_path / "worker.log", {"KEYE_RESULT_TTL_SECONDS": "7200"}):
        eventually(lambda: redis.ttl(keys.record(job_id)) > 600 and redis.ttl(keys.events(job_id)) > 600)
    assert redis.hget(keys.record(job_id), "state") == "CANCELLED"


@pytest.mark.holds(
    "docs/operations.md#how-do-i-upgrade-a-fleet",
    "What a worker of 0.2 had taken when it died lies in `unacked`",
)
def test_a_message_in_the_hands_of_a_dead_worker_of_the_release_before_is_taken_up(
    released: Path, redis: Redis, redis_url: str, tmp_path: Path
) -> None:
    """One that was put into the list by hand, and never claimed: no record tells of it."""
    settings = {"KEYE_REDIS_URL": redis_url, "KEYE_MODEL_PATH": str(tmp_path)}
    settings |= {f"KEYE_{name}_FOLDER": str(tmp_path / name) for name in ("CACHE", "RUN", "SPOOL")}

    @contextmanager
    def worker(name: str, **environ: str) -> Iterator[int]:
        command = (sys.executable, "-m", "celery", "-A", "tests.support.echo_worker", "worker", "--pool", "threads")
        with (tmp_path / f"{name}.log").open("wb") as log:
            own = {"env": os.environ | settings | environ, "cwd": tmp_path, "stdout": log, "stderr": log}
            process = subprocess.Popen([*command, "-n", f"{name}@%h"], **own)
        try:
            yield process.pid
        finally:
            process.kill()
            process.wait()

    with worker("before", PYTHONPATH=f"{released}{os.pathsep}{released.parent / 'source'}"):
        redis.lpush(QUEUE, message_around(body_of({"job": {"prompt": "wait 300"}}), "by-hand", 0, is_recorded=False))
        eventually(lambda: redis.hget(keys.record("by-hand"), "state") == "RUNNING", within_seconds=90)
        assert redis.hlen("unacked") == 1
    # As if it had died a moment earlier, between taking and claiming.
    redis.delete(keys.record("by-hand"), keys.events("by-hand"), keys.LEASES)
    theirs = json.dumps([json.loads(message("theirs", None, Priority.NORMAL)), "", "mails"])
    redis.hset("unacked", "theirs", theirs)
    redis.zadd("unacked_index", {"theirs": 1})
    with worker("today", PYTHONPATH=PYTHONPATH, KEYE_LEASE_SECONDS="2") as pid:
        eventually(lambda: str(redis.hget(keys.record("by-hand"), "worker")).endswith(f":{pid}"), within_seconds=90)
        assert redis.hgetall("unacked") == {"theirs": theirs}
        assert redis.zrange("unacked_index", 0, -1) == ["theirs"]


# A worker's reading of twenty media, of which its cache holds eight; tells how many it had to download.
READER = """
import os, random, sys
from pathlib import Path
from keye.worker.media.fetch.media_cache import MediaCache

def download(handle):
    global num_asked
    num_asked += 1
    os.pwrite(handle, content, 0)

num_asked = 0
cache = MediaCache(Path(sys.argv[1]), 8 * 2**16)
for name in sys.argv[2].split():
    content = random.Random(name).randbytes(2**16)
    with cache.open((name,), 2**16, download) as file:
        assert file.read() == content, name
print(num_asked)
"""


def test_workers_of_both_releases_share_a_media_cache(released: Path, tmp_path: Path) -> None:
    def read(names: str, packages: Path | None) -> Any:
        return run(READER, str(tmp_path / "cache"), names, packages=packages, folder=tmp_path)

    chosen = random.Random(5)
    wishes = [" ".join(str(chosen.randrange(20)) for _ in range(200)) for _ in range(4)]
    with ThreadPoolExecutor() as workers:
        answers = list(workers.map(read, wishes, [released, None, released, None]))
    assert all(0 < num_asked < 200 for num_asked in answers)
    assert list((tmp_path / "cache" / "partial").iterdir()) == []
    # What one of them has downloaded serves the other, save that today's wants to know that it is right.
    assert read("a b", None) == 2
    assert read("a b", released) == 0
    assert read("c d", released) == 2
    assert read("c d c d", None) == 2
    assert read("a b c d", released) == read("a b c d", None) == 0


def send_newer(redis: Redis) -> str:
    """Queue a job of a version that neither release knows; returns its id."""
    sealed = seal(AnalysisJob(prompt="?")).model_dump(mode="json") | {"schema_version": 99}
    unrecorded = message_around(body_of({"sealed": sealed}), sealed["job_id"], PRIORITY_STEPS[Priority.NORMAL], False)
    redis.lpush(message_list(Priority.NORMAL), unrecorded)
    return str(sealed["job_id"])


def test_a_job_that_grew_has_a_higher_schema_version(released: Path, tmp_path: Path) -> None:
    """Else workers of the release before would take its new fields for faults."""
    script = "import json, keye.config.wire as wire; print(json.dumps([wire.SCHEMA_VERSION, wire.schemas()['job']]))"
    version, schema = run(script, packages=released, folder=tmp_path)
    today = schemas()["job"]
    if version == SCHEMA_VERSION:
        assert without_words(today) == without_words(schema)
    for name, model in [("", today), *today["$defs"].items()]:
        before = (schema["$defs"].get(name, {}) if name else schema).get("properties")
        for field, facts in model.get("properties", {}).items():
            assert before is None or field in before or facts["added_in"] > version, f"{name}.{field}"


def without_words(schema: Any) -> Any:
    match schema:
        case dict():
            return {name: without_words(inner) for name, inner in schema.items() if name != "description"}
        case list():
            return [without_words(inner) for inner in schema]
        case _:
            return schema
