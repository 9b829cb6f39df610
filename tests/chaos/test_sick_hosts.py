"""A worker whose host is sick fails no job: it gives them back, says so, takes no more, and is well again by itself."""

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import boto3
import pytest
from PIL import Image

from keye.config.codes import ErrorCode, JobState
from keye.config.job import ImagePart
from keye.config.outcome import JobFailure
from keye.producer import Client, Job
from keye.producer.status import read_status
from keye.worker.daemon.exit_codes import ExitCode
from tests.chaos.broker import Broker
from tests.chaos.conftest import Gate
from tests.chaos.echo_workers import EchoWorker, EchoWorkers
from tests.chaos.ledger import outcome_of, wait_for_all
from tests.chaos.sick_hosts import WAYS, FullDisk, SickHost
from tests.support.conditions import eventually

NUM_JOBS = 200
NAMED_WITHIN_SECONDS = 10
WELL_WITHIN_SECONDS = 30
BUCKET = "sick-hosts"
AWS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture
def folder() -> Iterator[Path]:
    """That another user may read, unlike pytest's own."""
    with tempfile.TemporaryDirectory(prefix="keye-sick-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture(params=WAYS, ids=lambda way: way.__name__)
def host(request: pytest.FixtureRequest, folder: Path) -> Iterator[SickHost]:
    host: SickHost = request.param(folder)
    yield host
    host.leave()


@pytest.fixture
def store(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, bytes], str]:
    """Puts bytes under a name, and says where they are."""
    for name, value in AWS.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3", endpoint_url=s3_endpoint)
    client.create_bucket(Bucket=BUCKET)

    def put(name: str, content: bytes) -> str:
        client.put_object(Bucket=BUCKET, Key=name, Body=content)
        return f"s3://{BUCKET}/{name}"

    return put


@pytest.fixture
def pictures(host: SickHost, store: Callable[[str, bytes], str]) -> Iterator[ImagePart]:
    """Each another one, in the store and below the media root by turns."""
    file = BytesIO()
    Image.new("RGB", (320, 240), "teal").save(file, "PNG")
    content = file.getvalue()
    local = host.root / "picture.png"
    local.write_bytes(content)

    def one(number: int) -> ImagePart:
        uri = store(f"{number}.png", content) if number % 2 else str(local)
        return ImagePart(uri=uri)

    return map(one, itertools.count())


@pytest.fixture
def keye_says(broker: Broker) -> Callable[[str], bool]:
    """Whether `keye status` has a line that holds this text."""
    return lambda text: any(text in line for line in read_status(broker.redis).lines())


@pytest.mark.timeout(180)
@pytest.mark.holds("docs/operations.md#is-it-up-and-is-it-taking-jobs", "`sick`: its host fails what every job needs")
@pytest.mark.holds(
    "docs/operations.md#a-worker-says-that-it-is-sick-what-must-i-do",
    "A job that meets a fault of its host goes back",
    "worker gpu-host-1:4711 sick on",
    "Alone, it keeps its jobs waiting.",
    "Only a fresh process helps where the engine died",
)
@pytest.mark.holds(
    "docs/reliability.md#promises",
    "A sick host fails no job.",
    "What a full disk, a lack of files or processes",
    "Proven by `tests/chaos/test_sick_hosts.py`.",
)
@pytest.mark.holds("docs/alerts.md#keyeworkersick", "`keye status` says what it is; cure that")
def test_the_jobs_of_a_sick_worker_are_answered_by_another_or_wait_until_it_is_well(
    host: SickHost,
    pictures: Iterator[ImagePart],
    broker: Broker,
    client: Client,
    workers: EchoWorkers,
    keye_says: Callable[[str], bool],
    s3_endpoint: str,
    gate: Gate,
) -> None:
    shared = {**AWS, "KEYE_S3_ENDPOINT_URL": s3_endpoint, "KEYE_MEDIA_ROOTS": str(host.root)}

    def start_the_one() -> EchoWorker:
        return workers.start(within=host.within, **{**shared, **host.settings})

    def submit(media: list[ImagePart]) -> list[Job]:
        return [client.submit(media=[medium], prompt="wait 0.02") for medium in media]

    def some(num_jobs: int) -> list[ImagePart]:
        return list(itertools.islice(pictures, num_jobs))

    def all_succeed(jobs: list[Job], within_seconds: float = 60) -> None:
        wait_for_all(broker.redis, jobs, within_seconds)
        outcomes = [outcome_of(broker.redis, job) for job in jobs]
        assert [outcome for outcome in outcomes if outcome.state is not JobState.SUCCEEDED] == []

    def fall_sick(num_jobs: int) -> tuple[list[Job], float]:
        media = some(num_jobs)
        host.sicken(one)
        began, jobs = time.monotonic(), submit(media)
        if host.restarts:
            assert one.exit_code(NAMED_WITHIN_SECONDS) == ExitCode.ENGINE_DIED
        else:
            eventually(lambda: keye_says(f"{one.name} sick"), NAMED_WITHIN_SECONDS)
        assert "This worker is sick" in one.log
        return jobs, time.monotonic() - began

    def be_cured() -> EchoWorker:
        host.cure(one)
        cured = start_the_one() if host.restarts else one
        eventually(lambda: cured.is_ready, WELL_WITHIN_SECONDS)
        return cured

    one, other = start_the_one(), workers.start(**shared)
    one.wait_until_ready()
    other.wait_until_ready()
    all_succeed(submit(some(20)))

    jobs, named_seconds = fall_sick(NUM_JOBS)
    all_succeed(jobs)
    one = be_cured()
    gate(f"{type(host).__name__}: {NUM_JOBS} jobs", f"named after {named_seconds:.1f} s", "all answered, 10 s")

    other.terminate()
    assert other.exit_code(30) == 0
    all_succeed(submit(some(20)))

    jobs, _ = fall_sick(20)
    began = time.monotonic()
    one = be_cured()
    gate(f"{type(host).__name__}, alone: 20 jobs", f"well after {time.monotonic() - began:.1f} s", "none lost, 30 s")
    all_succeed(jobs)

    if not host.restarts:
        fall_sick(5)
        one.terminate()
        assert one.exit_code(30) == 0


@pytest.mark.timeout(180)
@pytest.mark.holds(
    "docs/reliability.md#promises", "Only a job that meets such faults where other work passes ends, as `HOST_FAULT`."
)
@pytest.mark.holds("docs/alerts.md#keyejobsfail", "`HOST_FAULT`: jobs that fill a disk")
def test_a_job_that_fills_the_disk_itself_ends_with_a_code_and_its_neighbours_with_an_answer(
    folder: Path,
    store: Callable[[str, bytes], str],
    broker: Broker,
    client: Client,
    workers: EchoWorkers,
    s3_endpoint: str,
) -> None:
    host = FullDisk(folder)
    try:
        worker = workers.start(KEYE_S3_ENDPOINT_URL=s3_endpoint, **host.settings, **AWS)
        worker.wait_until_ready()
        file = BytesIO()
        Image.new("RGB", (320, 240), "teal").save(file, "PNG")
        large = client.submit(media=[ImagePart(uri=store("large.png", bytes(20 * 2**20)))], prompt="x")
        small = [
            client.submit(media=[ImagePart(uri=store(f"{i}.png", file.getvalue()))], prompt="x") for i in range(10)
        ]
        wait_for_all(broker.redis, [large, *small], within_seconds=60)
        outcome = outcome_of(broker.redis, large)
        assert isinstance(outcome, JobFailure)
        assert outcome.code is ErrorCode.HOST_FAULT
        assert "No space left on device" in outcome.message
        assert {outcome_of(broker.redis, job).state for job in small} == {JobState.SUCCEEDED}
        eventually(lambda: worker.is_ready, WELL_WITHIN_SECONDS)
    finally:
        host.leave()
