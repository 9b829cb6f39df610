"""The same worker under somebody else's supervisor: Celery's own command."""

import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image
from redis import Redis

from keye.config.codes import JobState
from keye.config.job import GenerationOptions, ImagePart
from keye.producer import Client, JobNotEnded
from keye.worker.daemon.exit_codes import ExitCode
from tests.acceptance.conftest import ECHO, Start, faulty_engine
from tests.support.conditions import eventually

CELERY = ("celery", "-A", "keye.worker.tasks.celery_app", "worker", "--loglevel", "INFO")


@pytest.mark.holds("docs/design.md#decisions", "worker --pool threads` does the same")
@pytest.mark.holds(
    "docs/operations.md#can-i-use-my-own-supervisor",
    "Yes; a worker is a Celery worker, one for each GPU",
    "celery -A keye.worker.tasks.celery_app worker --pool threads",
)
def test_plain_celery_answers_jobs_and_ends_on_sigterm(start: Start, client: Client, tmp_path: Path) -> None:
    Image.new("RGB", (84, 84), "red").save(tmp_path / "red.png")
    worker = start(*CELERY, "--pool", "threads")
    ready = worker.wait_until_ready()
    job = client.submit(
        prompt="What is this?",
        media=[ImagePart(uri=str(tmp_path / "red.png"))],
        generation=GenerationOptions(max_new_tokens=8),
    )
    result = job.result(timeout=30)
    assert result.worker.pid == ready.worker.pid == worker.process.pid
    assert result.model == ready.model
    worker.ask_to_end()
    assert worker.exit_code() == ExitCode.OK


@pytest.mark.holds("docs/operations.md#how-did-a-process-end", "The engine's thread ended, as with a lost device")
def test_an_engine_that_dies_gives_its_jobs_back_and_ends_the_worker(
    start: Start, client: Client, tmp_path: Path
) -> None:
    fault = tmp_path / "fault"
    worker = start(*CELERY, **faulty_engine(fault))
    worker.wait_until_ready()
    fault.write_text("die")
    job = client.submit(prompt="What is this?", generation={"max_new_tokens": 2})
    assert worker.exit_code() == ExitCode.ENGINE_DIED
    assert "This worker is sick" in worker.log
    assert "the GPU has fallen off the bus" in worker.log
    fault.unlink()
    start(*CELERY).wait_until_ready()
    assert job.result(timeout=30).attempts == 2


@pytest.mark.holds(
    "docs/reliability.md#promises",
    "A step that outlasts `KEYE_STEP_SECONDS`,",
)
@pytest.mark.holds(
    "docs/operations.md#how-did-a-process-end",
    "native code that let no thread of Python run for `KEYE_STEP_SECONDS`",
)
def test_an_engine_that_lets_no_thread_run_ends_the_worker(start: Start, client: Client, tmp_path: Path) -> None:
    worker = start(*CELERY, KEYE_STEP_SECONDS="3", **faulty_engine(tmp_path / "fault"))
    worker.wait_until_ready()
    (tmp_path / "fault").write_text("freeze")
    client.submit(prompt="What is this?")
    assert worker.exit_code() == 1
    assert "in step_or_fail" in worker.log  # where it is


@pytest.mark.holds("docs/scaling.md#how-many-gpus-that-is", "Workers cost Redis little while they wait")
def test_an_idle_worker_sends_few_commands(start: Start, redis: Redis) -> None:
    start(*ECHO).wait_until_ready()
    began_at, before = time.monotonic(), redis.info("stats")["total_commands_processed"]
    time.sleep(8)  # what is counted is time that passes
    rate = (redis.info("stats")["total_commands_processed"] - before) / (time.monotonic() - began_at)
    assert 2 < rate < 20


@pytest.mark.holds("docs/design.md#decisions", "The pool must be `threads`")
@pytest.mark.holds("docs/operations.md#can-i-use-my-own-supervisor", "any other ends with 11")
def test_another_pool_is_refused_with_the_cure_however_it_is_asked_for(start: Start) -> None:
    custom = {"CELERY_CUSTOM_WORKER_POOL": "celery.concurrency.solo:TaskPool"}
    workers = [
        start(*CELERY, "--pool", "solo"),
        start(*CELERY, "-P", "processes"),
        start(*CELERY, "--pool", "custom", **custom),
        # Not installed; Celery notices only where it is asked for on the command line.
        start(*CELERY, CELERY_WORKER_POOL="gevent"),
    ]
    for worker in workers:
        assert worker.exit_code() == ExitCode.WRONG_POOL
        assert "--pool threads" in worker.log


@pytest.mark.holds("docs/operations.md#can-i-use-my-own-supervisor", "where it cannot import what `--pool` names")
def test_a_pool_that_celery_itself_cannot_import_ends_in_celery(start: Start) -> None:
    if find_spec("gevent"):
        pytest.skip("gevent is installed")
    worker = start(*CELERY, "--pool", "gevent")
    assert worker.exit_code() == 1
    assert "No module named 'gevent'" in worker.log


@pytest.mark.holds("docs/operations.md#can-i-use-my-own-supervisor", "That pool does not grow")
@pytest.mark.parametrize(
    ("options", "settings"), [(["--autoscale", "3,1"], {}), ([], {"CELERY_WORKER_AUTOSCALE": "3"})]
)
def test_a_pool_that_is_to_grow_is_refused_with_the_cure(
    start: Start, options: list[str], settings: dict[str, str]
) -> None:
    worker = start(*CELERY, *options, **settings)
    assert worker.exit_code() == ExitCode.PREFLIGHT_FAILED
    assert "as many jobs as its engine runs, KEYE_CONCURRENCY at most" in worker.log


@pytest.mark.holds("docs/operations.md#can-i-use-my-own-supervisor", "What you do without: the checks before starting")
@pytest.mark.holds("docs/operations.md#how-did-a-process-end", "The checkpoint could not be loaded")
def test_a_checkpoint_that_cannot_be_loaded_ends_the_worker_with_its_own_code(start: Start, tmp_path: Path) -> None:
    worker = start(*CELERY, "--pool", "threads", KEYE_MODEL_PATH=str(tmp_path / "nothing-here"))
    assert worker.exit_code() == ExitCode.MODEL_LOAD_FAILED
    assert "nothing-here" in worker.log


def test_an_app_that_takes_pickle_is_refused(start: Start, tmp_path: Path) -> None:
    app = "from keye.worker.tasks.celery_app import celery_app\ncelery_app.conf.accept_content = ['json', 'pickle']\n"
    (tmp_path / "own_app.py").write_text(app)
    worker = start("celery", "-A", "own_app", "worker", "--pool", "threads", C_FORCE_ROOT="1")
    assert worker.exit_code() == ExitCode.PREFLIGHT_FAILED
    assert "accept_content takes pickle" in worker.log


@pytest.mark.holds("docs/operations.md#can-i-use-my-own-supervisor", "A second signal ends it at once here too (16).")
@pytest.mark.holds(
    "docs/operations.md#how-do-i-stop-or-restart-a-worker-without-losing-jobs",
    "Within a second it takes no more jobs",
    "so is everything by a second signal (16)",
)
def test_sigterm_ends_the_taking_of_jobs_within_a_second_and_a_second_one_the_process(
    start: Start, client: Client
) -> None:
    worker = start("celery", "-A", "tests.support.echo_worker", "worker", "--loglevel", "INFO")
    worker.wait_until_ready()
    running = client.submit(prompt="wait 600")
    eventually(lambda: running.state is JobState.RUNNING, within_seconds=10)

    def is_left_waiting() -> bool:  # a second's wait: a busy machine may answer late a job that it did take
        late = client.submit(prompt="wait 0")
        with suppress(JobNotEnded):
            late.result(timeout=1)
        return late.state is JobState.QUEUED

    worker.ask_to_end()
    eventually(is_left_waiting, within_seconds=3)
    assert running.state is JobState.RUNNING
    worker.ask_to_end()
    assert worker.exit_code() == ExitCode.FORCED


@pytest.mark.holds("docs/operations.md#how-did-a-process-end", "a model that was not ready after `KEYE_LOAD_SECONDS`")
@pytest.mark.parametrize(("fault", "told"), [("hang", "KEYE_LOAD_SECONDS"), ("freeze", "Timeout (0:00:15)!")])
def test_a_model_that_never_gets_ready_ends_the_worker(start: Start, tmp_path: Path, fault: str, told: str) -> None:
    (tmp_path / "fault").write_text(fault)
    worker = start(*CELERY, **faulty_engine(tmp_path / "fault"), KEYE_LOAD_SECONDS="10")
    assert worker.exit_code(within_seconds=120) == 1
    assert told in worker.log  # and below it, where each thread was
    assert "bootsteps.py" in worker.log
