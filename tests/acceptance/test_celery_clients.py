"""docs/celery.md, section by section: clients that are not ours, a real worker process and a real server.

What the page prints is run as it is printed, by a Python that cannot import our packages.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import celery
import pytest
from celery import Celery, chain, chord, group
from celery.canvas import Signature
from celery.result import AsyncResult
from PIL import Image
from redis import Redis

from keye.config import keys
from keye.config.codes import ErrorCode, JobState
from keye.config.faults import JobFailed
from keye.config.topology import ANALYZE_TASK, QUEUE
from keye.producer import Client
from keye.worker.daemon.exit_codes import ExitCode
from tests.acceptance.conftest import ECHO, Start, Started, npm_install
from tests.support.checkout import ROOT
from tests.support.conditions import eventually
from tests.support.pages import printed as printed_by

PAGE = "docs/celery.md"
printed = partial(printed_by, PAGE)
PRINTED_URL = "redis://127.0.0.1:6379/0"
OWN = ("celery", "-A", "results", "worker", "--pool", "solo", "--loglevel", "INFO", "-n", "results@%h")
OTHERS_PYTHON = f"""
import sys
sys.path.append({str(Path(celery.__file__).parents[1])!r})
from importlib.util import find_spec
assert not any(map(find_spec, ("config", "producer", "worker")))
"""


def run_elsewhere(program: str, redis_url: str) -> str:
    """What a printed program prints where there are Celery and its packages, but none of ours."""
    code = OTHERS_PYTHON + program.replace(PRINTED_URL, redis_url)
    command = [sys.executable, "-I", "-S", "-W", "error", "-c", code]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def job(prompt: str, **fields: Any) -> dict[str, Any]:
    return {"job": {"prompt": prompt, **fields}}


def send(app: Celery, prompt: str, **options: Any) -> AsyncResult:
    return app.send_task(ANALYZE_TASK, kwargs=job(prompt), queue=QUEUE, **options)


def ask(app: Celery, prompt: str) -> Signature:
    return app.signature(ANALYZE_TASK, kwargs=job(prompt), queue=QUEUE, immutable=True)


def failure_of(task: AsyncResult) -> JobFailed:
    with pytest.raises(JobFailed) as failed:
        task.get(timeout=60)
    assert task.state == "FAILURE"
    return failed.value


@pytest.fixture
def app(redis_url: str) -> Iterator[Celery]:
    """A client's, as it comes."""
    with Celery("client", broker=redis_url, backend=redis_url, set_as_current=False) as app:
        # The worker's own task is shared with every app of a process in which another test has imported it.
        app.finalize()
        app.tasks.pop(ANALYZE_TASK, None)
        yield app
        # Results that are garbage later would end a subscription at a server that is gone by then.
        app.backend.result_consumer.subscribed_to.clear()


@pytest.fixture
def start_own(start: Start, tmp_path: Path, redis_url: str) -> Callable[[], Started]:
    """The page's app of the user's own."""

    def run() -> Started:
        source, _ = printed("Go on with the answer: link, chain, group, chord")
        (tmp_path / "results.py").write_text(source.replace(PRINTED_URL, redis_url))
        own = start(*OWN)
        eventually(lambda: " ready." in own.log, within_seconds=60)
        return own

    return run


def test_printed_clients_read_answers_and_failures(start: Start, redis_url: str, tmp_path: Path) -> None:
    Image.new("RGB", (84, 84), "red").save(tmp_path / "cat.jpg")
    # With a model: echoes look at no media.
    start("celery", "-A", "keye.worker.tasks.celery_app", "worker").wait_until_ready()
    (sending,) = printed("Send a job, wait for its answer")
    (failing,) = printed("When it fails")
    program = sending.replace("/srv/media", str(tmp_path)) + failing
    *answer, failure = run_elsewhere(program, redis_url).splitlines()
    assert re.fullmatch(r"\S.* \d+", " ".join(answer))
    assert failure == "INVALID_JOB 1 fault: job.prompt: String should have at least 1 character open"


def test_all_options_of_both_protocols_are_answered(start: Start, app: Celery, redis: Redis) -> None:
    start(*ECHO, KEYE_CONCURRENCY="64").wait_until_ready()
    began = datetime.now(UTC)
    soon = began + timedelta(seconds=3)
    options: list[dict[str, Any]] = [
        *({}, {"countdown": 2}, {"eta": soon}, {"expires": 60}, {"expires": soon + timedelta(seconds=60)}),
        *({"priority": priority} for priority in range(10)),
        *({"time_limit": 1, "soft_time_limit": 1}, {"headers": {"trace": "7"}}, {"shadow": "pictures"}),
        *({"argsrepr": "none", "kwargsrepr": "a job"}, {"reply_to": "elsewhere"}, {"link": []}),
        {"retries": 2, "retry": True, "retry_policy": {"max_retries": 1}},
    ]
    sent: list[tuple[dict[str, Any], AsyncResult]] = []
    for protocol in (1, 2):
        app.conf.task_protocol = protocol
        sent += [(each, send(app, "wait 1.2", **each)) for each in (*options, {"task_id": f"orders:{protocol}"})]
    stamped = ask(app, "wait 1.2")
    stamped.stamp(trace="7")
    sent.append(({}, stamped.apply_async()))
    for each, task in sent:
        assert task.get(timeout=60)["answer"] == "wait 1.2", each
        assert task.state == "SUCCESS"
        record = redis.hgetall(keys.record(task.id))
        assert record["priority"] == ("low" if each.get("priority", 0) >= 6 else "normal")
        not_before = each.get("eta", began + timedelta(seconds=each.get("countdown", 0)))
        assert float(record["claimed_at"]) >= not_before.timestamp()


def test_the_trace_of_a_message_is_its_jobs_unless_that_names_another(start: Start, app: Celery, redis: Redis) -> None:
    start(*ECHO).wait_until_ready()
    sent, own = (f"00-{'4b' * 16}-{span}-01" for span in ("0f" * 8, "f0" * 8))
    for header, fields, kept in [(sent, {}, sent), (sent, {"traceparent": own}, own), ("of none", {}, None)]:
        kwargs = job("hello", **fields)
        task = app.send_task(ANALYZE_TASK, kwargs=kwargs, queue=QUEUE, headers={"traceparent": header})
        assert task.get(timeout=60)["answer"] == "hello"
        assert json.loads(redis.hget(keys.record(task.id), "sealed"))["job"].get("traceparent") == kept


def test_results_are_written_for_who_ignores_them(start: Start, app: Celery) -> None:
    start(*ECHO).wait_until_ready()
    task = send(app, "hello", ignore_result=True)
    assert task.get(timeout=60) is None
    assert app.AsyncResult(task.id).get(timeout=60)["answer"] == "hello"


def test_expires_ends_a_job_that_waits_and_one_that_runs(start: Start, app: Celery) -> None:
    start(*ECHO).wait_until_ready()
    for task in (send(app, "hello", countdown=3, expires=1), send(app, "wait 60", expires=1)):
        assert failure_of(task).code is ErrorCode.DEADLINE_EXCEEDED


def test_what_is_no_plain_json_is_refused(start: Start, app: Celery) -> None:
    start(*ECHO).wait_until_ready()
    compressed, pickled = send(app, "hello", compression="zlib"), send(app, "hello", serializer="pickle")
    positional = app.send_task(ANALYZE_TASK, [job("hello")["job"]], queue=QUEUE)
    sentences = [failure_of(task).failure.message for task in (compressed, pickled, positional)]
    for sentence, words in zip(sentences, ("is compressed", "'application/json'", "job: Field required"), strict=True):
        assert words in sentence


def test_priorities_are_taken_in_three_steps(start: Start, app: Celery, redis: Redis) -> None:
    start(*ECHO, KEYE_CONCURRENCY="1").wait_until_ready()
    blocker, taken = (send(app, "wait 2", priority=0) for _ in range(2))
    eventually(lambda: redis.hget(keys.record(blocker.id), "state") == JobState.RUNNING)
    sent = {priority: send(app, "hello", priority=priority) for priority in (9, 5, 1)}
    for task in (taken, *sent.values()):
        task.get(timeout=60)
    claimed_at = {priority: str(redis.hget(keys.record(task.id), "claimed_at")) for priority, task in sent.items()}
    assert sorted(claimed_at, key=claimed_at.__getitem__) == [1, 5, 9]


@pytest.mark.parametrize("terminate", [False, True])
def test_revoke_cancels_what_waits_runs_or_is_not_due(
    start: Start, start_own: Callable[[], Started], app: Celery, redis: Redis, client: Client, terminate: bool
) -> None:
    start(*ECHO, KEYE_CONCURRENCY="1").wait_until_ready()
    start_own()
    not_due = send(app, "hello", countdown=300)
    eventually(lambda: redis.exists(keys.record(not_due.id)))
    running = send(app, "wait 300")
    eventually(lambda: redis.hget(keys.record(running.id), "state") == JobState.RUNNING)
    waiting = [send(app, "wait 300") for _ in range(3)]
    app.control.revoke([task.id for task in waiting[1:]], terminate=terminate)
    for task in (not_due, waiting[0], running):
        task.revoke(terminate=terminate)
    for task in (not_due, running, *waiting):
        assert failure_of(task).code is ErrorCode.CANCELLED
        assert client.find(task.id).state is JobState.CANCELLED
    assert send(app, "hello").get(timeout=60)["answer"] == "hello"


def test_printed_canvases_go_on_in_an_app_of_the_users_own(
    start: Start, start_own: Callable[[], Started], redis_url: str
) -> None:
    start(*ECHO, KEYE_CELERY_CANVAS="results/*").wait_until_ready()
    own = start_own()
    _, program = printed("Go on with the answer: link, chain, group, chord")
    assert run_elsewhere(program, redis_url).splitlines() == ["['one']", "['one', 'two']", "2"]
    eventually(lambda: len(re.findall(r"Task keep\[.*succeeded in .*: \['one'\]", own.log)) == 2)
    eventually(lambda: re.search(r"Task report\[.*succeeded in .*: 'INVALID_JOB'", own.log))


def test_canvases_may_be_nested(start: Start, start_own: Callable[[], Started], app: Celery) -> None:
    start(*ECHO, KEYE_CELERY_CANVAS="results/*").wait_until_ready()
    start_own()
    keep, count = (app.signature(name, queue="results") for name in ("keep", "count"))
    constant = app.signature("count", args=(["one", "two", "three"],), queue="results", immutable=True)
    for canvas, expected in [
        (chain(ask(app, "a"), keep.clone(["more"])), ["a", "more"]),
        (chain(ask(app, "a"), constant), 3),
        (chain(ask(app, "a"), group(keep, keep)), [["a"], ["a"]]),
        (chain(ask(app, "a"), group(keep, keep), count), 2),
        (chain(group(ask(app, "a"), ask(app, "b")), count), 2),
        (chain(constant, ask(app, "a"), keep), ["a"]),
        (chain(constant, group(ask(app, "a"), ask(app, "b")), count), 2),
        (chord([chain(ask(app, "a"), keep), chain(ask(app, "b"), keep)], count), 2),
        (group(chain(ask(app, "a"), keep), chord([ask(app, "b")], count)), [["a"], 1]),
    ]:
        assert canvas.apply_async().get(timeout=20) == expected, canvas
    failed = chain(ask(app, "raise ValueError"), keep).apply_async()
    assert failure_of(failed.parent).code is ErrorCode.INTERNAL
    stamped = chain(ask(app, "a"), keep)
    stamped.stamp(trace="7")
    assert "has the options" in failure_of(stamped.apply_async().parent).failure.message


def test_a_job_may_follow_jobs_where_its_own_queue_is_allowed(start: Start, app: Celery) -> None:
    start(*ECHO, KEYE_CELERY_CANVAS="keye.jobs/keye.analyze").wait_until_ready()
    for canvas in (
        chain(ask(app, "a"), ask(app, "b"), ask(app, "c")),
        chord([ask(app, "a"), ask(app, "b")], ask(app, "c")),
    ):
        assert canvas.apply_async().get(timeout=20)["answer"] == "c"


def test_what_no_operator_allowed_is_refused_and_a_group_needs_no_leave(start: Start, app: Celery) -> None:
    start(*ECHO).wait_until_ready()
    answers = group(ask(app, "one"), ask(app, "two")).apply_async().get(timeout=60)
    assert [each["answer"] for each in answers] == ["one", "two"]
    keep = app.signature("keep", queue="results")
    refused = [
        *(ask(app, "one").apply_async(link=keep), ask(app, "one").apply_async(link_error=keep)),
        *(chain(ask(app, "one"), keep).apply_async().parent, chord([ask(app, "one")], keep).apply_async().parent[0]),
    ]
    for task in refused:
        assert str(failure_of(task)) in (ROOT / PAGE).read_text()
    nowhere = ask(app, "one").apply_async(link=app.signature("keep"))
    assert "name one by .set(queue=...)" in failure_of(nowhere).failure.message


@pytest.mark.holds(
    "docs/design.md#decisions",
    "answers whoever looks at a worker; remote commands that change one, and events for Flower",
)
def test_commands_that_look_are_answered_and_those_that_change_are_refused(start: Start, app: Celery) -> None:
    start(*ECHO).wait_until_ready()
    task = app.send_task(ANALYZE_TASK, kwargs=job("wait 300", metadata={"camera": "lobby"}), queue=QUEUE)
    inspect = app.control.inspect(timeout=30, limit=1)
    (active,) = eventually(lambda: next(iter(inspect.active().values())))
    assert active["id"] == task.id
    assert not any(word in str(active) for word in ("wait 300", "lobby"))
    (pong,) = inspect.ping().values()
    assert pong == {"ok": "pong"}
    (stats,) = inspect.stats().values()
    assert stats["total"] == {ANALYZE_TASK: 1}
    for look in (inspect.reserved, inspect.scheduled, inspect.registered, inspect.active_queues, inspect.conf):
        assert look()
    for name, arguments in {
        "shutdown": {},
        "rate_limit": {"task_name": ANALYZE_TASK, "rate_limit": "1/h"},
        "cancel_consumer": {"queue": QUEUE},
        "add_consumer": {"queue": "results"},
        "pool_grow": {"n": 1},
        "pool_shrink": {"n": 1},
        "pool_restart": {},
        "autoscale": {"max": 1, "min": 1},
        "time_limit": {"task_name": ANALYZE_TASK, "hard": 1},
        "election": {"id": "1", "topic": "task", "action": {}},
        "enable_events": {},
        "memdump": {},
        "revoke_by_stamped_headers": {"headers": {"trace": "7"}},
    }.items():
        (answer,) = app.control.broadcast(name, arguments, reply=True, timeout=30, limit=1)
        (told,) = answer.values()
        assert told == {"error": f"{name} changes a worker; KEYE_CELERY_CONTROL=1 allows it"}
    task.revoke()
    failure_of(task)
    assert send(app, "still here").get(timeout=60)["answer"] == "still here"


@pytest.mark.holds("docs/design.md#decisions", "only where a setting allows them (celery.md)")
def test_an_operator_may_allow_commands_that_change(start: Start, app: Celery) -> None:
    worker = start(*ECHO, KEYE_CELERY_CONTROL="1")
    worker.wait_until_ready()
    for name in ("pool_grow", "pool_shrink"):
        (answer,) = app.control.broadcast(name, {"n": 1}, reply=True, timeout=30, limit=1)
        assert [list(told) for told in answer.values()] == [["error"]]
    (answer,) = app.control.broadcast("add_consumer", {"queue": "more"}, reply=True, timeout=30, limit=1)
    assert [list(told) for told in answer.values()] == [["ok"]]
    app.control.shutdown()
    assert worker.exit_code() == ExitCode.OK


def test_flower_lists_workers_and_tasks_and_revokes(start: Start, app: Celery, redis_url: str) -> None:
    start(*ECHO, KEYE_CELERY_EVENTS="1").wait_until_ready()
    (block,) = printed("Look: inspect and Flower", language="")
    command = shlex.split(block.splitlines()[-1].replace("$KEYE_REDIS_URL", redis_url))
    flower = start(*command, "--address=127.0.0.1", "--port=0", FLOWER_UNAUTHENTICATED_API="true")
    eventually(lambda: "Connected to redis" in flower.log)
    url = re.findall(r"Visit me at (\S+)", flower.log)[0]

    def call(path: str, method: str = "GET") -> Any:
        with urlopen(Request(f"{url}/api/{path}", method=method), timeout=30) as answer:
            return json.load(answer)

    (worker,) = eventually(lambda: call("workers?refresh=1"), within_seconds=60)
    ended, failed, running = (send(app, prompt) for prompt in ("hello", "raise ValueError", "wait 300"))
    wanted = {ended.id: "SUCCESS", failed.id: "FAILURE", running.id: "STARTED"}
    eventually(lambda: {task_id: told["state"] for task_id, told in call("tasks").items()} == wanted)
    assert {(told["worker"], told["args"], told["kwargs"]) for told in call("tasks").values()} == {(worker, "", "")}
    assert call(f"task/result/{ended.id}")["result"]["answer"] == "hello"
    call(f"task/revoke/{running.id}?terminate=true", "POST")
    assert failure_of(running).code is ErrorCode.CANCELLED
    eventually(lambda: call(f"task/info/{running.id}")["state"] == "FAILURE")


@pytest.fixture(scope="session")
def node_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where Node finds the package celery-node."""
    folder = tmp_path_factory.mktemp("node")
    npm_install(folder, "celery-node@0.5.9")
    return folder


def test_the_printed_node_client_reads_answers_and_failures(node_folder: Path, start: Start, redis_url: str) -> None:
    start(*ECHO).wait_until_ready()
    (program,) = printed("From Node", language="js")
    (node_folder / "client.mjs").write_text(program)
    environ = os.environ | {"KEYE_REDIS_URL": redis_url}
    command = ["node", str(node_folder / "client.mjs")]
    ended = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == [
        "谁在招手",
        "INVALID_JOB 1 fault: job.prompt: String should have at least 1 character",
    ]
