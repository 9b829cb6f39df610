"""docs/operations.md: what it prints is what is printed, its names and numbers are those of the code."""

import json
import logging
import os
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
from redis import Redis
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from keye.config import connection, keys, quarantine
from keye.config.codes import ErrorCode, JobState, Stage
from keye.config.job import Priority
from keye.config.outcome import JobFailure, ModelIdentity, WorkerIdentity
from keye.config.presence import EXPIRY_SECONDS, EngineUse, Presence, StarvedSeconds, WorkerState
from keye.config.settings import Settings
from keye.config.topology import message, message_list
from keye.producer import Client, QueueFull, reader, transport
from keye.producer.cli import app
from keye.producer.jobs_cli import lines_of
from keye.producer.progress import JobStatus
from keye.producer.status import FleetStatus, QueueStatus
from keye.worker.daemon import preflight, supervisor, watch
from keye.worker.daemon.endpoint import HostCollector
from keye.worker.daemon.exit_codes import ExitCode
from keye.worker.leases.job_lease import LeaseStore
from keye.worker.leases.reaper import Reaper
from keye.worker.media import job_media
from keye.worker.media.decode import allowance, pool
from keye.worker.media.frames import video
from keye.worker.results.outbox import Spool
from keye.worker.results.settlement import Settlement
from keye.worker.tasks import moves, retry_policy, stragglers
from keye.worker.telemetry import health, log, metrics, redaction
from tests.support.checkout import PYTHONPATH, ROOT
from tests.support.conditions import eventually
from tests.support.decoder_children import children_of
from tests.support.leased_jobs import a_failure, a_job, a_reaper, claim
from tests.support.pages import printed

PAGE = "docs/operations.md"
TEXT = " ".join((ROOT / PAGE).read_text().split())
IDENTITY = WorkerIdentity(host="gpu-host-1", pid=4711, device="NVIDIA H100 80GB HBM3")
MODEL = ModelIdentity(name="Keye-VL-8B-Preview", model_type="Keye", precision="bfloat16")
READY = Presence(worker=IDENTITY, state=WorkerState.READY, model=MODEL, max_tokens=40960, template_tokens=8).model_copy(
    update={
        "engine": EngineUse(
            running=16,
            max_running=64,
            seconds=3600,
            starved_seconds=StarvedSeconds(fetch=3, decode=41),
            kv_blocks_used=860,
            num_kv_blocks=2000,
        )
    }
)


def run_python(code: str, *arguments: str, folder: Path, **environ: str) -> str:
    """What it writes to stderr."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("KEYE_", "AWS_"))}
    command = [sys.executable, "-c", code, *arguments]
    ran = subprocess.run(
        command, env=own | {"PYTHONPATH": PYTHONPATH} | environ, cwd=folder, capture_output=True, text=True
    )
    return ran.stderr


@pytest.mark.holds("docs/operations.md#it-does-not-start-why", "broker: redis://queue.internal:6379/0 cannot be used")
def test_two_faults_are_told_as_printed(tmp_path: Path) -> None:
    golden = ROOT / "tests/golden/preview/checkpoint"
    folder = tmp_path / "Keye-VL"
    folder.mkdir()
    for file in golden.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    (weights,) = golden.glob("*.safetensors")
    tensors = load_file(weights)
    shard_of = {name: f"model-{index % 5 + 1:05}-of-00005.safetensors" for index, name in enumerate(tensors)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shard_of}))
    for shard in {*shard_of.values()} - {"model-00003-of-00005.safetensors"}:
        save_file({name: tensors[name] for name in tensors if shard_of[name] == shard}, folder / shard)

    code = "from keye.worker.daemon.cli import main; import sys; sys.argv = ['keye-worker', 'run']; main()"
    settings = {"KEYE_REDIS_URL": "redis://127.0.0.1:1/0", "KEYE_MODEL_PATH": str(folder), "KEYE_DEVICE": "cpu"}
    settings |= {f"KEYE_{name}_FOLDER": str(tmp_path / name) for name in ("CACHE", "RUN", "SPOOL")}
    told = run_python(code, folder=tmp_path, **settings)
    (block,) = printed(PAGE, "It does not start. Why?", language="")
    assert block.replace("queue.internal:6379", "127.0.0.1:1") in told


@pytest.mark.holds("docs/operations.md#is-it-up-and-is-it-taking-jobs", "redis-cli get keye:worker:gpu-host-1:4711")
def test_presence_is_as_printed() -> None:
    assert keys.worker(IDENTITY.host, IDENTITY.pid) == "keye:worker:gpu-host-1:4711"
    shown = READY.model_dump_json()
    (line,) = re.findall(r"^\{\"worker\":.*$", (ROOT / PAGE).read_text(), re.MULTILINE)
    assert re.sub(r'"model":\{.*?\}', '"model":{...}', shown) == line


@pytest.mark.holds("docs/operations.md#how-many-jobs-wait-and-how-many-run", "keye status high 0 queued")
def test_status_is_as_printed() -> None:
    depths = {"high": (0, 0.0), "normal": (212, 41.0), "low": (0, 0.0)}
    status = FleetStatus(
        queues=tuple(QueueStatus(priority=name, depth=n, oldest_seconds=s) for name, (n, s) in depths.items()),
        running=16,
        dead_letters=3,
        quarantined_messages=0,
        workers=(READY,),
        work_seconds=118.0,
        drain_seconds=59.0,
    )
    (block,) = printed(PAGE, "How many jobs wait, and how many run?", language="")
    assert ["keye status", *status.lines()] == block.splitlines()


@pytest.mark.holds("docs/operations.md#what-do-the-metrics-tell", "to know | look at")
def test_each_metric_of_the_table_is_told_with_the_labels_it_names(redis: Redis) -> None:
    redis.hset(keys.WORK, "0:0:0:0:0:1:auto", "1 2")
    redis.set(keys.worker(IDENTITY.host, IDENTITY.pid), READY.model_dump_json())
    of_host = HostCollector(lambda: {"gpu0": (health.Health.READY, 0)}, redis).collect()
    labels = {sample.name: sample.labels.keys() for family in of_host for sample in family.samples}
    for each in vars(metrics).values():
        if isinstance(each, metrics.Counter | metrics.Gauge | metrics.Histogram):
            (family,) = each.collect()
            name = f"{family.name}_total" if family.type == "counter" else family.name
            labels[name] = dict.fromkeys(each._labelnames).keys()
    section = (ROOT / PAGE).read_text().split("## What do the metrics tell?")[1].split("\n## ")[0]
    for row in re.findall(r"^\| .* \|$", section, re.MULTILINE)[1:]:
        named = re.findall(r"\bkeye_\w+", row)
        assert set(named) <= labels.keys(), row
        by = {
            label for labelled in re.findall(r"by (`\w+`(?: and `\w+`)?)", row) for label in labelled.split("`")[1::2]
        }
        assert by <= {label for name in named for label in labels[name]}, row


@pytest.mark.holds(
    "docs/operations.md#how-do-i-keep-a-backlog-from-growing-without-end",
    "Jobs that are put into the lists past the client are not counted.",
)
def test_jobs_put_into_the_lists_are_not_counted(redis: Redis, redis_url: str) -> None:
    for number in range(3):
        redis.lpush(message_list(Priority.NORMAL), message(f"other-{number}", None, Priority.NORMAL))
    with Client(Settings(redis_url=redis_url, max_queue_depth=1)) as client:
        client.submit(prompt="?")
        with pytest.raises(QueueFull):
            client.submit(prompt="?")


@pytest.mark.holds(
    "docs/operations.md#what-became-of-one-job",
    "`keye status <job id>` tells how far it is and since when",
    "keye status 7d3c0d6e-2c1c-4f0e-9a57-3c2f8d1b6a10",
)
def test_a_job_is_told_of_as_printed() -> None:
    status = JobStatus(
        job_id="7d3c0d6e-2c1c-4f0e-9a57-3c2f8d1b6a10",
        state=JobState.RUNNING,
        stage=Stage.GENERATE,
        attempt=1,
        frames_done=128,
        frames_total=128,
        num_tokens=312,
        place=None,
        seconds_left=12.4,
        has_worker=True,
        submitted_at=None,
        since=datetime(2026, 11, 28, 3, 12, 45).timestamp(),
        seconds=41.7,
        worker="gpu-host-1:4711",
    )
    (block,) = printed(PAGE, "What became of one job?", language="")
    assert [f"keye status {status.job_id}", *lines_of(status)] == block.splitlines()


@pytest.mark.holds(
    "docs/operations.md#what-became-of-one-job", "`keye result <job id>` has the answer; what lies beneath"
)
def test_what_lies_beneath_a_result_is_where_the_page_says(redis: Redis, redis_url: str) -> None:
    with connection.connect(redis_url) as connected:
        store, sealed = LeaseStore(connected, 30), a_job()
        redis.hset(keys.record(sealed.job_id), mapping=sealed.record)
        lease = claim(store, sealed, "gpu-host-1:4711")
        Settlement(connected, 3600, 3600).settle(lease, a_failure(lease, "it broke"))
    told = CliRunner().invoke(app, ["result", sealed.job_id, "--redis-url", redis_url])
    assert "it broke" in told.output
    fields = redis.hgetall(f"keye:job:{sealed.job_id}")
    assert (fields["state"], fields["attempts"], fields["worker"]) == ("FAILED", "1", "gpu-host-1:4711")
    assert JobFailure.model_validate_json(fields["outcome"]).message == "it broke"
    (first, *_) = redis.xrange(f"keye:job:{sealed.job_id}:events", "-", "+")
    assert json.loads(first[1]["event"])["stage"] == Stage.OPEN
    assert json.loads(first[1]["event"])["at"] > 0


@pytest.mark.holds(
    "docs/operations.md#what-does-the-log-say", "job 9f079d38-6ba6-4999-a1fb-abb94c957b02: running, attempt 1 (00-"
)
@pytest.mark.holds("docs/operations.md#what-does-the-log-say", "attempt 1 failed in fetch, again in 4.2 s")
def test_records_are_as_printed() -> None:
    traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    sealed = a_job()
    lease = moves.Claimed(sealed.job_id, "token", 1, 3, 0.0, None, None, None)
    failure = JobFailure(
        job_id=sealed.job_id,
        code=ErrorCode.MEDIA_UNREACHABLE,
        message="…",
        stage=Stage.FETCH,
        retryable=True,
        attempts=1,
    )
    text, as_json = printed(PAGE, "What does the log say?", language="")
    for form, block in ((log.TextLines, text), (log.JsonLines, as_json)):
        inner, outer = os.pipe()
        stream = log.LogStream(outer)
        stream.setFormatter(form("gpu0", lambda line: line))
        moves.log.addHandler(stream)
        moves.log.setLevel(logging.INFO)
        try:
            with log.about(job_id=sealed.job_id, attempt=1, traceparent=traceparent):
                if form is log.TextLines:
                    moves.log_claim(lease)
                else:
                    moves.log_retry(lease, failure, 4.2)
            stream.flush()
        finally:
            moves.log.removeHandler(stream)
        (line,) = os.read(inner, 10_000).decode().splitlines()
        if form is log.TextLines:
            for varies in (r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}", r"[0-9a-f]{8}-[-0-9a-f]{27}"):
                line, block = re.sub(varies, "…", line), re.sub(varies, "…", block)
            assert line == block.strip()
        else:
            shown, made = json.loads(block.replace("\n", " ")), json.loads(line)
            assert list(made) == list(shown)
            for name in ("level", "logger", "worker", "state", "stage", "code", "attempt", "traceparent"):
                assert made[name] == shown[name]
            assert made["message"].replace(sealed.job_id, "9f079d38-…") == shown["message"]


LOGGING = """
import logging, os, sys
from keye.config.settings import Settings
from keye.worker.telemetry.log import flush_log, set_up_log

set_up_log(Settings(log_level="DEBUG"), "worker", "INFO", *sys.argv[1:])
logging.getLogger("botocore.endpoint").debug("of a library")
logging.getLogger("keye.worker").debug("of ours")
flush_log()
if sys.argv[1:]:
    os.rename("worker.log", "worker.log.1")
    logging.getLogger("keye.worker").debug("to one that is renamed")
    flush_log()
    os.truncate("worker.log.1", 0)
    logging.getLogger("keye.worker").debug("to one that is truncated")
    flush_log()
"""


@pytest.mark.holds("docs/operations.md#what-does-the-log-say", "`KEYE_LOG_LEVEL=DEBUG` is for our own records")
def test_debug_is_for_our_own_records(tmp_path: Path) -> None:
    told = run_python(LOGGING, folder=tmp_path)
    assert "DEBUG/worker] of ours" in told
    assert "of a library" not in told


@pytest.mark.holds(
    "docs/operations.md#what-does-the-log-say", "is opened once and appended to: have logrotate copy and truncate it"
)
def test_a_log_file_is_copied_and_truncated_and_not_renamed(tmp_path: Path) -> None:
    (tmp_path / "worker.log").write_text("there before\n")
    assert run_python(LOGGING, "worker.log", folder=tmp_path) == ""
    assert not (tmp_path / "worker.log").exists()
    (line,) = (tmp_path / "worker.log.1").read_text().splitlines()
    assert line.endswith("to one that is truncated")


@pytest.mark.holds(
    "docs/operations.md#what-does-the-log-say", "AWS keys and session tokens, `Authorization` headers and signatures"
)
def test_keys_of_the_env_file_are_hidden_too(tmp_path: Path) -> None:
    secret = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
    (tmp_path / ".env").write_text(f"AWS_ACCESS_KEY_ID=of-the-file\nAWS_SECRET_ACCESS_KEY={secret}\n")
    told = run_python(f"{LOGGING}\nlogging.warning('signed with {secret}')\nflush_log()", folder=tmp_path)
    assert "signed with ***" in told


@pytest.mark.holds(
    "docs/operations.md#what-does-the-log-say",
    "up to 5,000 lines wait",
    "more than 32,000 characters",
    "fewer than 8 characters",
)
@pytest.mark.holds("docs/operations.md#how-long-may-a-job-take", "told so 3 s after its time.", "12 s later")
@pytest.mark.holds(
    "docs/operations.md#a-worker-was-killed-or-its-machine-is-gone-what-must-i-do",
    "within `KEYE_LEASE_SECONDS` and a seventh of it.",
)
@pytest.mark.holds(
    "docs/operations.md#what-can-a-broken-or-hostile-file-do",
    "as is every child after 500 media",
    "PyAV decode videos of more than 512 MiB",
)
@pytest.mark.holds("docs/operations.md#what-became-of-a-message-that-no-worker-could-read", "It keeps the newest 1,000")
@pytest.mark.holds("docs/operations.md#which-media-does-a-worker-read", "eight at a time")
def test_numbers_are_those_of_the_code(redis: Redis) -> None:
    lease, spool = 30.0, Spool(ROOT)
    told = [
        f"told so {stragglers.GRACE_SECONDS:g} s after its time. "
        f"{watch.PATIENCE_SECONDS - stragglers.GRACE_SECONDS:g} s later",
        f"lets the others finish for {watch.FINISH_SECONDS:g} s",
        f"not beaten for {health.HUNG_AFTER_SECONDS:g} s, or its supervisor not for {health.SILENT_AFTER_SECONDS:g}",
        f"falls silent for {EXPIRY_SECONDS} seconds",
        f"up to {log.MAX_WAITING_LINES:,} lines wait",
        f"more than {redaction.MAX_CHARS:,} characters",
        f"fewer than {redaction.MIN_SECRET_CHARS} characters",
        f"every child after {pool.MAX_MEDIA_A_CHILD} media",
        "plus {pyav:.0f} MB a child ({torchcodec:.0f} with".format_map(
            {decoder: num_bytes / 10**6 for decoder, num_bytes in preflight.DECODER_BYTES.items()}
        ),
        f"at most {allowance.WORKING_BYTES // 2**30} GiB besides its code and the pixels",
        f"PyAV decode videos of more than {video._DECORD_MAX_BYTES // 2**20} MiB",
        f"the newest {quarantine.MAX_MESSAGES:,}, of each the first {quarantine.MAX_KEPT_BYTES // 1024} KiB",
        f"{preflight.WARN_SKEW_SECONDS:g} seconds are a warning",
        f"0 to {retry_policy.FIRST_PAUSE_SECONDS:g}, 8, 16 .. {retry_policy.MAX_PAUSE_SECONDS:g} seconds",
        f"What hangs {supervisor.KILL_MARGIN_SECONDS:g} seconds longer is cut off",
        f"({transport.RETRY_AFTER_SECONDS:g} s while none has ended",
        f"of a client ({connection.MAX_CONNECTIONS}, at least 2)",
        f"(seconds, by itself {connection.SOCKET_TIMEOUT_SECONDS:g})",
        f"The folder takes {spool.max_files:,} results or {spool.max_bytes // 2**20} MiB",
    ]
    assert [each for each in told if each not in TEXT] == []
    assert (job_media._MAX_DOWNLOADS, reader.LOOK_SECONDS) == (8, 2.0)
    # The turn that comes just before a lease ends, and the next.
    reaper: Reaper = a_reaper(LeaseStore(redis, lease))
    assert 2 * reaper.period_seconds <= lease / 7


@pytest.mark.holds("docs/operations.md#what-can-a-broken-or-hostile-file-do", "torch's threads and those of a video")
def test_torch_keeps_to_the_share() -> None:
    code = """
import sys, torch
from keye.worker.model.device import keep_to_cores
torch.set_num_threads(8)
for device, decoders in (("cuda", 8), ("cpu", 2), ("cpu", 8)):
    keep_to_cores(torch.device(device), 4, decoders)
    print(torch.get_num_threads(), file=sys.stderr)
    torch.set_num_threads(8)
"""
    assert run_python(code, folder=ROOT).split() == ["4", "2", "1"]


@pytest.mark.holds("docs/operations.md#how-did-a-process-end", "2 is a wrong command line")
def test_a_wrong_command_line_ends_with_2() -> None:
    from keye.worker.daemon.cli import app as worker_app

    assert CliRunner().invoke(worker_app, ["run", "--gpu", "0"]).exit_code == 2
    assert 2 not in set(ExitCode)


@pytest.mark.holds("docs/operations.md#how-long-may-a-job-take", "what | setting | past it")
def test_limits_of_the_table_are_settings_and_codes() -> None:
    section = (ROOT / PAGE).read_text().split("## How long may a job take?")[1].split("\n## ")[0]
    assert set(re.findall(r"KEYE_(\w+)", section.upper())) <= {name.upper() for name in Settings.model_fields}
    assert set(re.findall(r"`([A-Z]+_[A-Z_]+)`", re.sub(r"`KEYE_\w+`", "", section))) <= set(ErrorCode)
    assert f"the process ends with {ExitCode.STEP_HUNG:d}" in section


@pytest.mark.holds(
    "docs/operations.md#what-can-a-broken-or-hostile-file-do",
    "its environment is empty; it may write no file",
    "the kernel ends a decoder first",
)
def test_a_decoder_has_no_environment_and_is_ended_before_its_worker() -> None:
    others = children_of(os.getpid())
    with pool.DecoderPool(1, silence_seconds=30, max_decoded_bytes=2**20):

        def confined() -> Path | None:
            """It says last that the kernel is to end it first."""
            started = [Path(f"/proc/{pid}") for pid in children_of(os.getpid()) - others]
            return next((child for child in started if (child / "oom_score_adj").read_text() == "1000\n"), None)

        child = eventually(confined)
        environ = (child / "environ").read_text().strip("\0").split("\0")
        assert {each.partition("=")[0] for each in environ} <= {"", "LD_LIBRARY_PATH"}
        # Where libraries would be looked for by some.
        assert (child / "cwd").readlink() == Path("/")
        assert re.search(r"^Max file size +0 +0 ", (child / "limits").read_text(), re.MULTILINE)
