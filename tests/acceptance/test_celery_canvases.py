"""docs/celery.md on what goes on with an answer, and on cancelling: real workers of both sides, a real server."""

import re
from collections.abc import Callable

import pytest
from celery import Celery, chain, chord, group
from celery.exceptions import ChordError
from redis import Redis

from keye.config import keys
from keye.config.codes import ErrorCode, JobState
from keye.config.faults import JobFailed, JobNotFound
from keye.config.topology import ANALYZE_TASK, QUEUE
from keye.producer import Client
from tests.acceptance.celery_clients import PAGE, ask, failure_of, job, printed, run_elsewhere, send
from tests.acceptance.conftest import ECHO, Start, Started
from tests.support.checkout import ROOT
from tests.support.conditions import eventually


@pytest.mark.holds(
    "docs/celery.md#cancel",
    "`task.revoke()` cancels the job, with",
    "`get` raises `JobFailed` with `CANCELLED`,",
    "A message that no worker",
    "Give that app a `control_exchange`",
)
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


@pytest.mark.holds(
    "docs/celery.md#go-on-with-the-answer-link-chain-group-chord",
    "All else has a worker",
    'from celery import Celery url = "redis://127.0.0.1:6379/0" app = Celery("results",',
    "from celery import Celery, chain,",
)
def test_printed_canvases_go_on_in_an_app_of_the_users_own(
    start: Start, start_own: Callable[[], Started], redis_url: str
) -> None:
    start(*ECHO, KEYE_CELERY_CANVAS="results/*").wait_until_ready()
    own = start_own()
    _, program = printed("Go on with the answer: link, chain, group, chord")
    assert run_elsewhere(program, redis_url).splitlines() == ["['one']", "['one', 'two']", "2"]
    eventually(lambda: len(re.findall(r"Task keep\[.*succeeded in .*: \['one'\]", own.log)) == 2)
    eventually(lambda: re.search(r"Task report\[.*succeeded in .*: 'INVALID_JOB'", own.log))


@pytest.mark.holds(
    "docs/celery.md#go-on-with-the-answer-link-chain-group-chord",
    "What follows is given the",
    "An immutable one is given",
    "Options that Celery's canvases do",
    "Canvases may be nested: a",
)
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


@pytest.mark.holds(
    "docs/celery.md#go-on-with-the-answer-link-chain-group-chord",
    "Where it follows another, `KEYE_CELERY_CANVAS`",
)
def test_a_job_may_follow_jobs_where_its_own_queue_is_allowed(start: Start, app: Celery) -> None:
    start(*ECHO, KEYE_CELERY_CANVAS="keye.jobs/keye.analyze").wait_until_ready()
    for canvas in (
        chain(ask(app, "a"), ask(app, "b"), ask(app, "c")),
        chord([ask(app, "a"), ask(app, "b")], ask(app, "c")),
    ):
        assert canvas.apply_async().get(timeout=20)["answer"] == "c"


@pytest.mark.holds(
    "docs/celery.md#go-on-with-the-answer-link-chain-group-chord",
    "A group of jobs needs",
    "Any other is refused, and",
    "INVALID_JOB: The message could not",
    "Each names its queue: `queue=`",
)
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
    "docs/celery.md#go-on-with-the-answer-link-chain-group-chord",
    "A job takes nothing from",
    "After a failure the rest",
    "The chord's `get` raises `JobFailed`",
)
def test_after_a_failure_nothing_goes_on_but_the_chords_own_error(
    start: Start, start_own: Callable[[], Started], app: Celery
) -> None:
    start(*ECHO, KEYE_CELERY_CANVAS="results/*,keye.jobs/keye.analyze").wait_until_ready()
    own = start_own()
    keep, count, report = (app.signature(name, queue="results") for name in ("keep", "count", "report"))
    failed = chain(ask(app, "raise ValueError"), keep).apply_async()
    assert failure_of(failed.parent).code is ErrorCode.INTERNAL
    chorded = chord([ask(app, "one"), ask(app, "raise ValueError")], count.on_error(report)).apply_async()
    with pytest.raises((JobFailed, ChordError)):
        chorded.get(timeout=60)
    # An id has no code.
    eventually(lambda: re.search(r"Task report\[.*TypeError\(.string indices must be integers", own.log))
    mutable = app.signature(ANALYZE_TASK, kwargs=job("b"), queue=QUEUE)
    assert failure_of(chain(ask(app, "a"), mutable).apply_async()).code is ErrorCode.INVALID_JOB
    assert chain(ask(app, "last"), keep).apply_async().get(timeout=60) == ["last"]
    # Received and succeeded, of the last one alone: nothing is called of the others, however long ago they failed.
    eventually(lambda: re.search(r"Task keep\[.* succeeded", own.log))
    assert own.log.count("Task keep[") == 2
    assert "Task count[" not in own.log


@pytest.mark.holds(
    "docs/celery.md#cancel",
    "A worker that starts later",
)
@pytest.mark.holds(
    "docs/celery.md#what-celerys-options-do",
    "`expires` | the job ends",
    "In a worker a job",
)
@pytest.mark.holds(
    "docs/celery.md#send-a-job-wait-for-its-answer",
    "The task's id is the",
    "An id of your own",
    "`task.state` is `PENDING` until the",
)
def test_what_no_worker_has_read_yet_is_known_to_none(start: Start, app: Celery, client: Client, redis: Redis) -> None:
    revoked, expired = send(app, "hello"), send(app, "wait 60", expires=1)
    unnamed = send(app, "hello", task_id="no job's")
    app.control.revoke(revoked.id)
    with pytest.raises(JobNotFound):
        client.find(revoked.id)
    start(*ECHO).wait_until_ready()
    assert revoked.get(timeout=60)["answer"] == "hello", "no worker was there to remember"
    assert client.find(revoked.id).state is JobState.SUCCEEDED
    assert failure_of(expired).code is ErrorCode.DEADLINE_EXCEEDED
    (unread,) = eventually(lambda: list(client.quarantine.select()))
    assert "its id is no job's" in unread.reason
    sooner = app.send_task(ANALYZE_TASK, kwargs=job("wait 60", deadline_seconds=1), queue=QUEUE, expires=60)
    assert failure_of(sooner).code is ErrorCode.DEADLINE_EXCEEDED
    own_priority = app.send_task(ANALYZE_TASK, kwargs=job("wait 60", priority="high"), queue=QUEUE, priority=9)
    eventually(lambda: redis.hget(keys.record(own_priority.id), "state") == JobState.RUNNING)
    assert redis.hget(keys.record(own_priority.id), "priority") == "high"
    assert own_priority.state == unnamed.state == "PENDING"
    own_priority.revoke()
    assert failure_of(own_priority).code is ErrorCode.CANCELLED
