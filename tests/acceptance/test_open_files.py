"""The soft limit on open files that shells and service managers give, 1,024: less than the jobs of a worker need."""

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from keye.producer import Client
from keye.worker.daemon.exit_codes import ExitCode
from tests.acceptance.conftest import ECHO, PICTURE, SlowStore, Start
from tests.acceptance.test_worker_log import RUN


@pytest.fixture
def common_limit() -> Iterator[None]:
    """What is started meanwhile has it."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.usefixtures("common_limit")
@pytest.mark.parametrize("command", [RUN, ECHO], ids=["keye-worker run", "celery"])
def test_it_is_raised_and_jobs_are_answered_beyond_it(
    command: tuple[str, ...], start: Start, client: Client, slow_store: SlowStore, tmp_path: Path
) -> None:
    slow_store.may_go_on.set()
    (tmp_path / "red.png").write_bytes(PICTURE)
    include = "tests.acceptance.many_files"
    worker = start(*command, CELERY_WORKER_INCLUDE=include, KEYE_S3_ENDPOINT_URL=slow_store.url)
    worker.wait_until_ready()
    media = [str(tmp_path / "red.png"), "s3://photos/red.png"]
    jobs = client.submit_many([{"prompt": f"say {number}", "media": media} for number in range(8)])
    answers = {end.answer for _, end in client.results(jobs, timeout=60)}
    assert answers == {f"say {number}" for number in range(8)}
    assert "Too many open files" not in worker.log
    worker.ask_to_end()
    assert worker.exit_code() == ExitCode.OK
