"""docs/celery.md, section by section: clients that are not ours, a real worker process and a real server.

What the page prints is run as it is printed, by a Python that cannot import our packages.
"""

import json
import os
import re
import shlex
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from celery import Celery
from celery.result import AsyncResult
from PIL import Image
from redis import Redis

from keye.config import keys
from keye.config.codes import ErrorCode, JobState
from keye.config.topology import ANALYZE_TASK, QUEUE, result_key
from keye.worker.daemon.exit_codes import ExitCode
from tests.acceptance.celery_clients import ask, failure_of, job, printed, run_elsewhere, send
from tests.acceptance.conftest import ECHO, Start, npm_install
from tests.support.conditions import eventually


@pytest.mark.holds(
    "docs/celery.md#when-it-fails",
    'import json task = app.send_task("keye.analyze",',
    "`JobFailed` has three arguments: the",
)
@pytest.mark.holds(
    "docs/celery.md#send-a-job-wait-for-its-answer",
    'from celery import Celery url = "redis://127.0.0.1:6379/0" app = Celery("client",',
    "Broker and backend are the",
)
@pytest.mark.holds(
    "docs/celery.md#how-do-i-use-it-from-celery",
    "Any Celery app may send",
)
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


@pytest.mark.holds(
    "docs/celery.md#what-celerys-options-do",
    "option | what it does",
    "`countdown`, `eta` | the job",
    "`task_id` | the job's id",
    "`time_limit`, `soft_time_limit` | nothing: use",
    "`retries` | nothing: use the",
    "`shadow`, stamps, `argsrepr`, `kwargsrepr`, `reply_to`",
    "Where it names none, 3",
    "Task protocols 1 and 2",
)
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


@pytest.mark.holds(
    "docs/celery.md#what-celerys-options-do",
    "`headers` | a `traceparent`, as",
)
def test_the_trace_of_a_message_is_its_jobs_unless_that_names_another(start: Start, app: Celery, redis: Redis) -> None:
    start(*ECHO).wait_until_ready()
    sent, own = (f"00-{'4b' * 16}-{span}-01" for span in ("0f" * 8, "f0" * 8))
    for header, fields, kept in [(sent, {}, sent), (sent, {"traceparent": own}, own), ("of none", {}, None)]:
        kwargs = job("hello", **fields)
        task = app.send_task(ANALYZE_TASK, kwargs=kwargs, queue=QUEUE, headers={"traceparent": header})
        assert task.get(timeout=60)["answer"] == "hello"
        assert json.loads(redis.hget(keys.record(task.id), "sealed"))["job"].get("traceparent") == kept


def test_job_by_hand_is_kept_as_it_says_and_left_alone_by_workers_that_do_not_know_that(
    start: Start, app: Celery, redis: Redis
) -> None:
    start(*ECHO).wait_until_ready()
    for own in ({"result_ttl_seconds": 60}, {}):
        task = app.send_task(ANALYZE_TASK, kwargs=job("hello", **own), queue=QUEUE)
        assert task.get(timeout=60)["answer"] == "hello"
        sealed = json.loads(redis.hget(keys.record(task.id), "sealed"))
        assert sealed["schema_version"] == (2 if own else 1)
        for name in (keys.record(task.id), result_key(task.id)):
            assert (0 < redis.ttl(name) <= 60) == bool(own)


@pytest.mark.holds(
    "docs/celery.md#what-celerys-options-do",
    "`ignore_result` | `get` gives None",
)
def test_results_are_written_for_who_ignores_them(start: Start, app: Celery) -> None:
    start(*ECHO).wait_until_ready()
    task = send(app, "hello", ignore_result=True)
    assert task.get(timeout=60) is None
    assert app.AsyncResult(task.id).get(timeout=60)["answer"] == "hello"


@pytest.mark.holds(
    "docs/celery.md#what-celerys-options-do",
    "`expires` | the job ends",
)
def test_expires_ends_a_job_that_waits_and_one_that_runs(start: Start, app: Celery) -> None:
    start(*ECHO).wait_until_ready()
    for task in (send(app, "hello", countdown=3, expires=1), send(app, "wait 60", expires=1)):
        assert failure_of(task).code is ErrorCode.DEADLINE_EXCEEDED


@pytest.mark.holds(
    "docs/celery.md#what-celerys-options-do",
    "`serializer` | json; all others",
    "`compression` | refused: a few",
    "A message with what is",
)
@pytest.mark.holds(
    "docs/celery.md#when-it-fails",
    "In a program that has",
)
@pytest.mark.holds(
    "docs/celery.md#send-a-job-wait-for-its-answer",
    "`job` has the fields of",
)
def test_what_is_no_plain_json_is_refused(start: Start, app: Celery) -> None:
    start(*ECHO).wait_until_ready()
    compressed, pickled = send(app, "hello", compression="zlib"), send(app, "hello", serializer="pickle")
    positional = app.send_task(ANALYZE_TASK, [job("hello")["job"]], queue=QUEUE)
    sentences = [failure_of(task).failure.message for task in (compressed, pickled, positional)]
    for sentence, words in zip(sentences, ("is compressed", "'application/json'", "job: Field required"), strict=True):
        assert words in sentence


@pytest.mark.holds(
    "docs/celery.md#what-celerys-options-do",
    "`priority` | 0 to 2",
)
def test_priorities_are_taken_in_three_steps(start: Start, app: Celery, redis: Redis) -> None:
    start(*ECHO, KEYE_CONCURRENCY="1").wait_until_ready()
    blocker, taken = (send(app, "wait 2", priority=0) for _ in range(2))
    eventually(lambda: redis.hget(keys.record(blocker.id), "state") == JobState.RUNNING)
    sent = {priority: send(app, "hello", priority=priority) for priority in (9, 5, 1)}
    for task in (taken, *sent.values()):
        task.get(timeout=60)
    claimed_at = {priority: str(redis.hget(keys.record(task.id), "claimed_at")) for priority, task in sent.items()}
    assert sorted(claimed_at, key=claimed_at.__getitem__) == [1, 5, 9]


@pytest.mark.holds(
    "docs/celery.md#change-workers-from-afar",
    "Those that change or end",
    "shutdown changes a worker; KEYE_CELERY_CONTROL=1",
)
@pytest.mark.holds(
    "docs/celery.md#look-inspect-and-flower",
    '`celery --broker "$KEYE_REDIS_URL" inspect ping`,',
)
@pytest.mark.holds(
    "docs/celery.md#cancel",
    "`revoke_by_stamped_headers` is refused.",
)
@pytest.mark.holds(
    "docs/design.md#decisions",
    "answers whoever looks at a worker; remote commands that change one, and events for Flower",
)
def test_commands_that_look_are_answered_and_those_that_change_are_refused(start: Start, app: Celery) -> None:
    start(*ECHO).wait_until_ready()
    eventually(lambda: app.control.ping(timeout=1))  # it hears commands a moment later than it takes jobs
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


@pytest.mark.holds(
    "docs/celery.md#change-workers-from-afar",
    "With `KEYE_CELERY_CONTROL=1` they do what",
    "A `shutdown` drains as SIGTERM",
)
@pytest.mark.holds("docs/design.md#decisions", "only where a setting allows them (celery.md)")
def test_an_operator_may_allow_commands_that_change(start: Start, app: Celery) -> None:
    worker = start(*ECHO, KEYE_CELERY_CONTROL="1")
    worker.wait_until_ready()
    eventually(lambda: app.control.ping(timeout=1))
    for name in ("pool_grow", "pool_shrink"):
        (answer,) = app.control.broadcast(name, {"n": 1}, reply=True, timeout=30, limit=1)
        assert [list(told) for told in answer.values()] == [["error"]]
    (answer,) = app.control.broadcast("add_consumer", {"queue": "more"}, reply=True, timeout=30, limit=1)
    assert [list(told) for told in answer.values()] == [["ok"]]
    app.control.shutdown()
    assert worker.exit_code() == ExitCode.OK


@pytest.mark.holds(
    "docs/celery.md#look-inspect-and-flower",
    "With `KEYE_CELERY_EVENTS=1` workers send Celery's",
    "export FLOWER_UNAUTHENTICATED_API=true # or one",
)
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


@pytest.mark.holds(
    "docs/celery.md#from-node",
    'import celery from "celery-node"; const',
)
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
