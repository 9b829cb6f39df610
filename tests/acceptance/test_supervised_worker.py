"""`keye-worker run` as an operator meets it: real processes, real signals, a real broker."""

import os
import re
import signal
from pathlib import Path

import pytest

from keye.config.codes import ErrorCode, JobState, Stage
from keye.config.event import StageStarted
from keye.config.job import GenerationOptions, ImagePart
from keye.config.presence import WorkerState, list_present
from keye.config.settings import Settings
from keye.config.topology import UNACKED
from keye.producer import Client, InvalidJob, Job, JobFailed
from keye.worker.daemon.exit_codes import ExitCode
from tests.acceptance.conftest import SlowStore, Start, faulty_engine, is_alive
from tests.support.conditions import eventually
from tests.support.pretended_driver import Card, write_nvidia_smi

RUN = ("keye.worker.daemon.cli", "run")


def submit(client: Client, uri: str, **options: int) -> Job:
    generation = GenerationOptions(max_new_tokens=8)
    return client.submit(prompt="What is this?", media=[ImagePart(uri=uri)], generation=generation, **options)


def has_reached(job: Job, stage: Stage, attempt: int = 1) -> bool:
    reached = (e for e in job.events() if isinstance(e, StageStarted))
    return any(event.stage is stage and event.attempt == attempt for event in reached)


@pytest.mark.holds("docs/design.md#decisions", "the parent never loads torch")
@pytest.mark.holds("docs/alerts.md#keyeworkerhung", "kill that process: its jobs start again elsewhere")
def test_a_killed_worker_process_comes_back_and_its_job_is_run_again(
    start: Start, client: Client, slow_store: SlowStore
) -> None:
    worker = start(*RUN, KEYE_S3_ENDPOINT_URL=slow_store.url, KEYE_LEASE_SECONDS="3")
    first = worker.wait_until_ready()
    assert "libtorch" not in Path(f"/proc/{worker.process.pid}/maps").read_text()
    job = submit(client, "s3://bucket/held.png")
    assert has_reached(job, Stage.FETCH)

    os.kill(first.worker.pid, signal.SIGKILL)
    slow_store.may_go_on.set()
    second = worker.wait_until_ready(other_than=first.worker.pid)
    result = job.result(timeout=30)

    assert result.attempts == 2
    assert result.worker.pid == second.worker.pid
    assert "killed by signal 9; it is started again in 1 s" in worker.log
    worker.ask_to_end()
    assert worker.exit_code() == ExitCode.OK


@pytest.mark.holds(
    "docs/reliability.md#promises",
    "A step that outlasts `KEYE_STEP_SECONDS`,",
)
@pytest.mark.holds(
    "docs/alerts.md#keyeworkerhung",
    "It ends by itself after `KEYE_STEP_SECONDS` and is started again",
    "The log of one that ended by itself has where each thread was.",
)
@pytest.mark.holds(
    "docs/operations.md#how-long-may-a-job-take",
    "`KEYE_STEP_SECONDS` | the process ends with 17, its jobs start again",
)
def test_a_step_that_never_ends_ends_its_process_and_the_job_is_answered_by_the_next(
    start: Start, client: Client, tmp_path: Path
) -> None:
    fault = tmp_path / "fault"
    worker = start(*RUN, KEYE_LEASE_SECONDS="3", KEYE_STEP_SECONDS="3", **faulty_engine(fault))
    hung = worker.wait_until_ready()
    fault.write_text("hang")
    job = client.submit(prompt="What is this?", generation=GenerationOptions(max_new_tokens=8))
    eventually(lambda: "ended with exit code 17 (STEP_HUNG); it is started again" in worker.log, within_seconds=30)
    fault.unlink()
    result = job.result(timeout=60)
    assert result.attempts >= 2
    assert result.worker.pid != hung.worker.pid
    assert "in step_or_fail" in worker.log  # where it hung


@pytest.mark.holds("docs/alerts.md#keyeworkergivenup", "the others work", "Its log says why it could not load.")
@pytest.mark.holds(
    "docs/operations.md#what-can-a-broken-or-hostile-file-do",
    "`keye-worker run` counts the workers it starts",
    "Images and videos are decoded in `KEYE_DECODERS` child processes of each worker process",
)
@pytest.mark.holds(
    "docs/operations.md#a-worker-was-killed-or-its-machine-is-gone-what-must-i-do",
    "the log has it as CRITICAL, and the workers of the other GPUs go on",
)
def test_a_gpu_that_no_model_gets_onto_is_given_up_and_the_others_go_on(
    start: Start, client: Client, tmp_path: Path
) -> None:
    write_nvidia_smi(tmp_path, Card("GPU-broken"), Card("GPU-good"), Card("GPU-of-others"))
    worker = start(
        *(*RUN, "--gpus", "0,GPU-good"),
        PATH=f"{tmp_path}:{os.environ['PATH']}",
        KEYE_DEVICE="cuda",
        CELERY_WORKER_INCLUDE="tests.acceptance.odd_gpus",
    )
    good = worker.wait_until_ready()
    eventually(lambda: "giving up" in worker.log, within_seconds=240)
    pauses = re.findall(r"GPU GPU-broken ended with exit code 12 .* started again in (\d+) s", worker.log)
    assert pauses == ["1", "2", "4", "8"]
    assert re.search(r"CRITICAL/supervisor] worker on GPU GPU-broken .* 1 of 2 workers go on", worker.log)
    assert "uncorrectable ECC error" in worker.log
    assert "GPU-of-others" not in worker.log

    result = client.submit(prompt="What is this?", generation=GenerationOptions(max_new_tokens=8)).result(timeout=30)
    assert result.worker.pid == good.worker.pid
    assert num_decoders(good.worker.pid) == Settings(host_workers=2).decoders
    worker.ask_to_end()
    assert worker.exit_code() == ExitCode.OK


def num_decoders(pid: int) -> int:
    children = Path(f"/proc/{pid}/task").glob("*/children")
    commands = [Path(f"/proc/{child}/cmdline").read_bytes() for file in children for child in file.read_text().split()]
    return sum(b"keye.worker.media.decode.child" in command for command in commands)


@pytest.mark.holds("docs/operations.md#which-gpus-are-used", "ends the start (10) with the list of those there are")
def test_a_gpu_that_is_not_there_ends_the_start_with_the_list_of_those_that_are(start: Start, tmp_path: Path) -> None:
    write_nvidia_smi(tmp_path, Card("GPU-aaaa"))
    worker = start(*RUN, "--gpus", "0,4", PATH=f"{tmp_path}:{os.environ['PATH']}", KEYE_DEVICE="auto")
    assert worker.exit_code() == ExitCode.PREFLIGHT_FAILED
    assert "--gpus: no such GPU: 4. nvidia-smi lists 0 (GPU-aaaa)." in worker.log


@pytest.mark.holds(
    "docs/producers.md#how-much-a-job-may-hold",
    "How many tokens a job may have is up to",
    "text without spaces, such as Chinese, is one word here",
    "ends in the worker as `PROMPT_TOO_LONG`",
)
@pytest.mark.holds(
    "docs/operations.md#is-it-up-and-is-it-taking-jobs",
    "the smallest of the live ones bounds what producers accept",
)
def test_what_no_worker_can_hold_is_refused_at_submit_as_far_as_words_tell(start: Start, client: Client) -> None:
    start(*RUN).wait_until_ready()
    for prompt, new in (("word " * 24_000, 8), ("7" * 24_000, 8), ("?", 4095)):
        with pytest.raises(InvalidJob, match=r"at least \d+ tokens, .* workers hold 4088 for one job"):
            client.submit(prompt=prompt, generation=GenerationOptions(max_new_tokens=new))
    most = client.submit(prompt="?", generation=GenerationOptions(max_new_tokens=4087)).result(timeout=120)
    assert most.usage.prompt_tokens == 4096 - 4087
    with pytest.raises(JobFailed) as failed:
        client.submit(prompt="字" * 24_000, generation=GenerationOptions(max_new_tokens=8)).result(timeout=60)
    assert failed.value.code is ErrorCode.PROMPT_TOO_LONG


@pytest.mark.holds("docs/alerts.md#keyeworkergivenup", "which drains the others first")
@pytest.mark.holds(
    "docs/operations.md#how-do-i-stop-or-restart-a-worker-without-losing-jobs",
    "It ends with 0.",
    "Send `SIGTERM`",
)
@pytest.mark.holds(
    "docs/operations.md#how-did-a-process-end",
    "Ended as asked; every running job was finished or given back.",
)
def test_sigterm_lets_a_running_job_finish_and_exits_0(start: Start, client: Client, slow_store: SlowStore) -> None:
    worker = start(*RUN, KEYE_S3_ENDPOINT_URL=slow_store.url)
    worker.wait_until_ready()
    running = submit(client, "s3://bucket/held.png")
    assert has_reached(running, Stage.FETCH)

    worker.ask_to_end()
    eventually(lambda: [p.state for p in list_present(worker.redis)] == [WorkerState.DRAINING], within_seconds=10)
    late = submit(client, "s3://bucket/late.png")
    slow_store.may_go_on.set()

    assert worker.exit_code() == ExitCode.OK
    assert running.state is JobState.SUCCEEDED
    assert late.state is JobState.QUEUED
    assert list_present(worker.redis) == []
    assert worker.redis.hlen(UNACKED) == 0


@pytest.mark.holds(
    "docs/operations.md#how-do-i-stop-or-restart-a-worker-without-losing-jobs",
    "by a second signal (16)",
)
def test_a_second_sigterm_does_not_wait_for_running_jobs(start: Start, client: Client, slow_store: SlowStore) -> None:
    worker = start(*RUN, KEYE_S3_ENDPOINT_URL=slow_store.url)
    ready = worker.wait_until_ready()
    assert has_reached(submit(client, "s3://bucket/held.png"), Stage.FETCH)
    worker.ask_to_end()
    eventually(lambda: "Waiting up to" in worker.log, within_seconds=10)
    worker.ask_to_end()
    assert worker.exit_code(within_seconds=5) == ExitCode.FORCED
    assert not is_alive(ready.worker.pid)


def test_a_killed_supervisor_leaves_no_process_behind(start: Start) -> None:
    worker = start(*RUN)
    (child,) = eventually(lambda: list_present(worker.redis), within_seconds=30)
    worker.process.kill()
    eventually(lambda: not is_alive(child.worker.pid), within_seconds=5)


def test_sigterm_does_not_wait_for_a_model_to_load(start: Start) -> None:
    worker = start(*RUN)
    (child,) = eventually(lambda: list_present(worker.redis), within_seconds=30)
    assert child.state is WorkerState.LOADING
    worker.ask_to_end()
    # A second or two where it is just mapping torch's libraries, on a busy machine.
    assert worker.exit_code(within_seconds=5) == ExitCode.OK
    assert not is_alive(child.worker.pid)


@pytest.mark.holds(
    "docs/operations.md#it-does-not-start-why",
    "checks before it starts and tells all faults in one message",
)
def test_all_faults_are_told_in_one_message_before_anything_starts(start: Start, tmp_path: Path) -> None:
    worker = start(*RUN, KEYE_REDIS_URL="redis://127.0.0.1:1/0", KEYE_MODEL_PATH=str(tmp_path / "nothing-here"))
    assert worker.exit_code() == ExitCode.PREFLIGHT_FAILED
    assert "preflight: 2 faults" in worker.log
    assert "127.0.0.1:1" in worker.log
    assert "nothing-here" in worker.log


@pytest.mark.holds(
    "docs/operations.md#it-does-not-start-why",
    "Settings with values out of range, and URLs, endpoints and buckets that are none, end it the same way (10), each",
)
def test_wrong_settings_are_all_told_by_name(start: Start) -> None:
    none = {"KEYE_REDIS_URL": "redis://a/b", "KEYE_S3_ENDPOINT_URL": "minio", "KEYE_S3_BUCKETS": "s3://a/b"}
    worker = start(*RUN, KEYE_CONCURRENCY="many", KEYE_PRECISION="int1", **none)
    assert worker.exit_code() == ExitCode.PREFLIGHT_FAILED
    assert "settings: KEYE_" in worker.log
    assert all(f"{name}: " in worker.log for name in (*none, "KEYE_CONCURRENCY", "KEYE_PRECISION"))


@pytest.mark.holds(
    "docs/operations.md#are-its-numbers-right-on-this-machine",
    "each form that the device might run is compared with attention written out in float32",
    "One that fails or differs is an error in the log",
)
def test_attention_that_is_wrong_or_fails_is_told_and_answers_come_by_another_form(
    start: Start, client: Client
) -> None:
    worker = start(*RUN, CELERY_WORKER_INCLUDE="tests.acceptance.odd_device")
    presence = worker.wait_until_ready()
    assert [warning.partition(" here: ")[0] for warning in presence.warnings] == [
        "attention by varlen_attn over block tables is wrong",
        "attention by flex_attention over blocks, varlen_attn for prompts does not run",
    ]
    assert all(warning in worker.log for warning in presence.warnings)
    result = client.submit(prompt="What is this?", generation=GenerationOptions(max_new_tokens=8)).result(timeout=30)
    form = "scaled_dot_product_attention over gathered blocks; images: varlen_attn"
    assert result.model.attention == presence.model.attention == form
