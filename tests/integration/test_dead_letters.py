"""Jobs that failed for good, as the operator finds them: through the real scripts, the real client and `keye dead`."""

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from redis import Redis
from typer.testing import CliRunner

from keye.config import keys
from keye.config.codes import ErrorCode, Stage
from keye.config.connection import connect
from keye.config.faults import DeadLetterNotFound
from keye.config.outcome import JobFailure, WorkerIdentity
from keye.config.presence import Presence, WorkerState
from keye.config.topology import result_key
from keye.config.wire import open_sealed
from keye.producer import AnalysisJob, Client, InvalidJob, Job, JobFailed, JobNotFound, JobState
from keye.producer.cli import app
from keye.producer.dead_letters import DeadLetter, change_media
from keye.producer.shell import ExitCode
from keye.worker.leases.claims import Claimed, QueuedJob
from keye.worker.leases.job_lease import LeaseStore
from keye.worker.results.settlement import Settlement
from keye.worker.telemetry.presence import Announcer
from tests.support.conditions import eventually
from tests.support.pages import printed

RESULT_TTL, DEAD_LETTER_TTL = 3600, 9000
CLIP = {"type": "video", "uri": "s3://clips/1", "content": "action", "min_pixels": 90_000}
PHOTO = {"type": "image", "uri": "/photos/1.jpg", "resized_height": 700, "resized_width": 700}


@pytest.fixture
def worker(redis_url: str) -> Iterator[Redis]:
    with connect(redis_url) as connection:
        yield connection


def run(worker: Redis, job: Job) -> Claimed:
    sealed = open_sealed(json.loads(worker.hget(keys.record(job.id), "sealed")))
    claimed = LeaseStore(worker, lease_seconds=30).claim(QueuedJob.of(sealed), "gpu-1:7")
    assert isinstance(claimed, Claimed)
    return claimed


def fail(worker: Redis, job: Job, code: ErrorCode = ErrorCode.OUT_OF_MEMORY) -> None:
    lease = run(worker, job)
    failure = failure_of(job, code).model_copy(update={"attempts": lease.attempt})
    assert Settlement(worker, RESULT_TTL, DEAD_LETTER_TTL).settle(lease, failure)


def failure_of(job: Job, code: ErrorCode = ErrorCode.OUT_OF_MEMORY) -> JobFailure:
    return JobFailure(job_id=job.id, code=code, message="It broke.", stage=Stage.GENERATE, retryable=True, attempts=1)


def ids(letters: Iterator[DeadLetter]) -> list[str]:
    return [letter.job_id for letter in letters]


@pytest.mark.holds(
    "docs/operations.md#which-jobs-failed-for-good-and-how-do-i-send-them-again",
    "with its input, its failure and all its attempts",
)
def test_failed_job_lies_there_with_its_input_its_failure_and_every_attempt(client: Client, worker: Redis) -> None:
    job = client.submit(prompt="how many?", media=[CLIP], metadata={"order": 7})
    first = run(worker, job)
    failure = JobFailure(
        job_id=job.id, code="MEDIA_UNREACHABLE", message="Away.", stage=Stage.FETCH, retryable=True, attempts=1
    )
    LeaseStore(worker, 30).retry(first, failure, 0, None)
    fail(worker, job)

    letter = client.dead_letters.find(job.id)
    assert letter.job.metadata == {"order": 7}
    assert letter.failure.code is ErrorCode.OUT_OF_MEMORY
    assert [(a.attempt, a.worker, a.stage, a.code, a.message) for a in letter.attempts] == [
        (1, "gpu-1:7", Stage.FETCH, ErrorCode.MEDIA_UNREACHABLE, "Away."),
        (2, "gpu-1:7", Stage.GENERATE, ErrorCode.OUT_OF_MEMORY, "It broke."),
    ]
    assert letter.attempts[0].ended_at <= letter.attempts[1].began_at <= letter.attempts[1].ended_at
    assert letter.attempts[1].ended_at == pytest.approx(letter.ended_at, abs=1e-3, rel=0)


@pytest.mark.holds("docs/producers.md#what-can-be-raised", "the dead letter or the message in quarantine is not there")
def test_only_failed_jobs_are_dead_letters(client: Client, worker: Redis) -> None:
    cancelled, waiting = client.submit(prompt="a"), client.submit(prompt="b")
    cancelled.cancel()
    late = client.submit(prompt="c", deadline_seconds=60)
    fail(worker, late, ErrorCode.DEADLINE_EXCEEDED)
    assert ids(client.dead_letters.select()) == []
    for job in (cancelled, waiting, late):
        with pytest.raises(DeadLetterNotFound, match=job.id):
            client.dead_letters.find(job.id)


@pytest.mark.parametrize("hours", [-5, 0, 5], ids=lambda hours: f"by a clock that is {hours} h off")
def test_letters_are_chosen_by_code_and_by_age(
    client: Client, worker: Redis, monkeypatch: pytest.MonkeyPatch, hours: float
) -> None:
    true_time = time.time
    monkeypatch.setattr("time.time", lambda: true_time() + hours * 3600)
    jobs = [client.submit(prompt="?") for _ in range(3)]
    codes = (ErrorCode.INTERNAL, ErrorCode.OUT_OF_MEMORY, ErrorCode.INTERNAL)
    for job, code in zip(jobs, codes, strict=True):
        fail(worker, job, code)
    worker.zincrby(keys.DEAD_LETTERS, -7200, jobs[0].id)

    everything = [job.id for job in jobs]
    assert ids(client.dead_letters.select()) == everything
    assert ids(client.dead_letters.select([ErrorCode.INTERNAL])) == [everything[0], everything[2]]
    assert ids(client.dead_letters.select(since_seconds=3600)) == everything[1:]
    assert ids(client.dead_letters.select([ErrorCode.INTERNAL], since_seconds=3600)) == everything[2:]


@pytest.mark.holds(
    "docs/operations.md#which-jobs-failed-for-good-and-how-do-i-send-them-again",
    "is a dead letter for `KEYE_DEAD_LETTER_TTL_SECONDS`",
)
def test_letters_older_than_their_time_leave_the_list(client: Client, worker: Redis) -> None:
    announce(worker, result=RESULT_TTL, dead_letter=DEAD_LETTER_TTL)
    old, new = client.submit(prompt="old"), client.submit(prompt="new")
    fail(worker, old)
    worker.zincrby(keys.DEAD_LETTERS, -DEAD_LETTER_TTL - 1, old.id)
    fail(worker, new)
    assert ids(client.dead_letters.select()) == [new.id]


def announce(worker: Redis, **kept_seconds: int) -> None:
    """A worker has been there, with these settings."""
    box = Presence(worker=WorkerIdentity(host="box", pid=7, device="cpu"), state=WorkerState.LOADING)
    announcer = Announcer(worker, box, "keye@box", kept_seconds)
    announcer.start()
    eventually(lambda: worker.exists(keys.worker("box", 7)))
    announcer.stop()


@pytest.mark.holds(
    "docs/operations.md#which-jobs-failed-for-good-and-how-do-i-send-them-again",
    "A failed job's outcome can be read for the longer of the two",
)
def test_a_letter_is_one_for_its_own_time_and_its_outcome_is_read_for_longer(client: Client, worker: Redis) -> None:
    announce(worker, result=RESULT_TTL, dead_letter=300)
    old, young = client.submit(prompt="old"), client.submit(prompt="young")
    for job in (old, young):
        assert Settlement(worker, RESULT_TTL, 300).settle(run(worker, job), failure_of(job))
    for moment, job, age in [("before", old, 299), ("after", old, 2)]:
        worker.zincrby(keys.DEAD_LETTERS, -age, job.id)
        worker.hincrbyfloat(keys.record(job.id), "ended_at", -age)
        expected = [old.id, young.id] if moment == "before" else [young.id]
        assert ids(client.dead_letters.select()) == expected
        assert client.status().dead_letters == len(expected)
    with pytest.raises(DeadLetterNotFound, match="older than KEYE_DEAD_LETTER_TTL_SECONDS"):
        client.dead_letters.find(old.id)
    with pytest.raises(JobFailed):
        old.result()
    assert 300 < worker.ttl(keys.record(old.id)) <= RESULT_TTL
    assert client.verify()[1] == []


@pytest.mark.holds(
    "docs/operations.md#which-jobs-failed-for-good-and-how-do-i-send-them-again",
    "Both times are those that the workers are set to",
)
def test_what_producers_end_or_send_again_is_kept_as_workers_say(client: Client, worker: Redis) -> None:
    def cancelled() -> int:
        job = client.submit(prompt="?", idempotency_key="k")
        job.cancel()
        # Its message is taken, and nobody is to wait for it any more.
        LeaseStore(worker, 30).claim(QueuedJob(job.id, {}), "worker")
        found = {worker.ttl(key) for key in (keys.record(job.id), keys.events(job.id), keys.idempotency("k"))}
        worker.delete(keys.idempotency("k"))
        (ttl,) = found
        return ttl

    assert cancelled() == pytest.approx(86400, abs=5), "no worker has ever been there"
    announce(worker, result=RESULT_TTL, dead_letter=DEAD_LETTER_TTL)
    assert cancelled() == pytest.approx(RESULT_TTL, abs=5)
    failed = client.submit(prompt="?")
    fail(worker, failed)
    assert worker.ttl(keys.record(failed.id)) == pytest.approx(DEAD_LETTER_TTL, abs=5)
    client.dead_letters.requeue(client.dead_letters.find(failed.id))
    for key in (keys.record(failed.id), keys.events(failed.id)):
        assert worker.ttl(key) == pytest.approx(RESULT_TTL, abs=5)


@pytest.mark.holds(
    "docs/alerts.md#an-alert-fired-what-does-it-mean-and-what-do-i-do",
    "fails and is kept to be sent again",
)
@pytest.mark.holds(
    "docs/operations.md#which-jobs-failed-for-good-and-how-do-i-send-them-again",
    "A requeued job has a new id",
)
def test_requeued_letter_is_a_new_job_with_the_changed_options(client: Client, worker: Redis) -> None:
    old = client.submit(prompt="how many?", media=[CLIP, PHOTO], idempotency_key="k", metadata={"order": 7})
    fail(worker, old)
    letter = client.dead_letters.find(old.id)
    new = client.dead_letters.requeue(letter, max_pixels=50_000, fps=0.5)

    assert new.id != old.id
    assert new.state is JobState.QUEUED
    asked = open_sealed(json.loads(worker.hget(keys.record(new.id), "sealed"))).job
    clip, photo = asked.media
    assert (clip.max_pixels, clip.min_pixels, clip.fps, clip.content) == (50_000, None, 0.5, None)
    assert (photo.max_pixels, photo.resized_height) == (50_000, None)
    assert (asked.prompt, asked.metadata) == ("how many?", {"order": 7})
    with pytest.raises(JobFailed):
        old.result()
    assert ids(client.dead_letters.select()) == []
    assert worker.hget(keys.record(old.id), "requeued_as") == new.id
    assert 0 < worker.ttl(keys.record(old.id)) <= 86400
    assert client.dead_letters.requeue(letter, max_pixels=50_000, fps=0.5).id == new.id, "cut off and repeated"


def test_media_of_chat_messages_are_changed_too_and_odd_options_are_refused() -> None:
    turns = [{"role": "user", "content": [CLIP, {"type": "text", "text": "and?"}]}]
    chat = AnalysisJob.model_validate({"messages": turns})
    (clip,) = change_media(chat, None, 4.0).all_media()
    assert clip.fps == 4.0
    assert change_media(chat, None, None) == chat
    with pytest.raises(InvalidJob, match="fps"):
        change_media(chat, None, 1000.0)


@pytest.mark.holds("docs/producers.md#what-can-be-raised", "never sent, purged, or ended longer ago")
@pytest.mark.holds(
    "docs/operations.md#which-jobs-failed-for-good-and-how-do-i-send-them-again",
    "A purged one is forgotten at once",
    "Only its id stays",
)
def test_purged_job_is_gone_and_its_key_is_free(client: Client, worker: Redis) -> None:
    job = client.submit(prompt="secret", idempotency_key="k")
    fail(worker, job)
    assert worker.exists(result_key(job.id))
    client.dead_letters.purge(client.dead_letters.find(job.id))
    with pytest.raises(JobNotFound):
        client.find(job.id)
    assert [entry["job_id"] for _, entry in worker.xrange(keys.ENDED)] == [job.id]
    left = [name for name in worker.scan_iter() if job.id in name or worker.type(name) == "string"]
    assert left == [], "of Celery too"
    assert client.submit(prompt="secret", idempotency_key="k").id != job.id


@pytest.mark.holds("docs/alerts.md#keyedeadlettersgrow", "`keye dead list --since 1h` says of which code.")
@pytest.mark.holds(
    "docs/alerts.md#keyejobsfail",
    "`keye dead list --since 1h --code <code>` which jobs",
    "`keye dead show <job id>` names what they ask",
    "Afterwards: `keye dead requeue --code <code>`.",
)
@pytest.mark.holds(
    "docs/operations.md#redis-is-full-what-must-i-do",
    "forget all that failed (`keye dead purge --all`)",
)
def test_keye_dead_lists_shows_requeues_and_purges(client: Client, worker: Redis, redis_url: str) -> None:
    def keye(*arguments: str) -> tuple[int, str]:
        told = CliRunner().invoke(app, ["dead", *arguments, "--redis-url", redis_url])
        return told.exit_code, told.output

    big, odd, other = (client.submit(prompt=prompt, media=["s3://clips/7.mp4"]) for prompt in ("big", "odd", "other"))
    fail(worker, big, ErrorCode.OUT_OF_MEMORY)
    fail(worker, odd, ErrorCode.MEDIA_CORRUPT)
    fail(worker, other, ErrorCode.INTERNAL)

    code, listed = keye("list", "--since", "1h", "--code", "OUT_OF_MEMORY", "--code", "INTERNAL")
    assert code == ExitCode.OK
    assert [line.split()[0] for line in listed.splitlines()] == [big.id, other.id]
    assert "OUT_OF_MEMORY in generate: It broke." in listed
    code, shown = keye("show", big.id)
    assert '"big" s3://clips/7.mp4' in shown
    assert "attempt 1: " in shown
    assert "gpu-1:7, in stage generate" in shown
    code, shown = keye("show", big.id, "--json")
    assert json.loads(shown)["sealed"]["job"]["prompt"] == "big"

    code, requeued = keye("requeue", "--code", "OUT_OF_MEMORY", "--max-pixels", "100000", "--fps", "1")
    assert code == ExitCode.OK
    old_id, _, new_id = requeued.split()
    assert (old_id, client.find(new_id).state) == (big.id, JobState.QUEUED)
    assert keye("purge", odd.id) == (ExitCode.OK, f"{odd.id}\n")
    assert keye("show", odd.id)[0] == ExitCode.NOT_FOUND
    assert keye("purge")[0] == ExitCode.INVALID
    assert keye("purge", other.id, "--all")[0] == ExitCode.INVALID
    assert keye("list", "--since", "yesterday")[0] == ExitCode.INVALID
    assert keye("purge", "--all", "--yes") == (ExitCode.OK, f"{other.id}\n")
    assert keye("list") == (ExitCode.OK, "")


@pytest.mark.holds(
    "docs/operations.md#which-jobs-failed-for-good-and-how-do-i-send-them-again",
    "keye dead list --since 2h --code OUT_OF_MEMORY",
    "and a new deadline",
)
def test_commands_of_the_page_do_what_stands_beside_them(client: Client, worker: Redis, redis_url: str) -> None:
    job = client.submit(prompt="?", media=["s3://clips/7.mp4"], deadline_seconds=60)
    fail(worker, job, ErrorCode.OUT_OF_MEMORY)
    fail(worker, unreachable := client.submit(prompt="?", media=[CLIP]), ErrorCode.MEDIA_UNREACHABLE)
    (block,) = printed("docs/operations.md", "Which jobs failed for good, and how do I send them again?", language="")
    told = []
    for line in block.splitlines():
        command = line.partition("#")[0].replace("<job id>", job.id).split()
        answer = CliRunner().invoke(app, command[1:], env={"KEYE_REDIS_URL": redis_url})
        assert answer.exit_code == ExitCode.OK, (line, answer.output)
        told.append(answer.output)
    listed, shown, smaller, slower, purged = told
    assert [line.split()[0] for line in listed.splitlines()] == [job.id]
    assert "attempt 1: " in shown
    (clip,) = asked(worker, smaller.split()[-1])
    assert clip.max_pixels == 300_000
    old, new = (float(worker.hget(keys.record(each), "deadline_at")) for each in (job.id, smaller.split()[-1]))
    assert new > old
    assert [clip.fps for clip in asked(worker, slower.split()[-1])] == [1.0]
    assert slower.split()[0] == unreachable.id
    assert purged == ""


def asked(worker: Redis, job_id: str) -> Any:
    return open_sealed(json.loads(worker.hget(keys.record(job_id), "sealed"))).job.media
