"""One odd job among many: whatever is wrong with it, or with what gives the jobs, no handle of another is lost."""

import json
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from redis import Redis
from typer.testing import CliRunner

from keye.config import keys
from keye.producer import AnalysisJob, Client, InvalidJob, Job, JobState, Settings, UploadFailed
from keye.producer.cli import app

HALF = "half \ud83d"
NUM_JOBS, PLACE = 600, 333


class Raising(Mapping[str, Any]):
    """Fields that cannot be read, as of a record whose database went away."""

    def __getitem__(self, name: str) -> Any:
        raise ConnectionError(f"the database is away {HALF}")

    def __iter__(self) -> Iterator[str]:
        return iter(["prompt"])

    def __len__(self) -> int:
        return 1


class RaisingPath(PathLike[str]):
    def __fspath__(self) -> str:
        raise RuntimeError("no path today")


class RaisingArray:
    def __array__(self) -> Any:
        raise RuntimeError("on the GPU")


def media_that_end_early() -> Iterator[str]:
    yield "/a.png"
    raise RuntimeError("no more media")


GOOD = AnalysisJob(prompt="?", metadata={"name": "whole"})
ODD: dict[str, Any] = {
    "half a prompt": {"prompt": HALF},
    "half a key": {"prompt": "?", "idempotency_key": HALF},
    "half a name": {"prompt": "?", HALF: 1},
    "half a metadata key": {"prompt": "?", "metadata": {HALF: 1}},
    "half a stop": {"prompt": "?", "generation": {"stop": [HALF]}},
    "half a URI": {"prompt": "?", "media": [f"/{HALF}.png"]},
    "half a chat": {"messages": [{"role": "user", "content": HALF}]},
    "half a copied key": GOOD.model_copy(update={"idempotency_key": HALF}),
    "copied nonsense": GOOD.model_copy(update={"priority": 7, "generation": None}),
    "half a copied metadata": GOOD.model_copy(update={"metadata": {"a": HALF}}),
    "fields that raise": Raising(),
    "path that raises": {"prompt": "?", "media": [RaisingPath()]},
    "array that raises": {"messages": [{"role": "user", "content": ["?", RaisingArray()]}]},
    "absent file": {"prompt": "?", "media": [Path("absent.jpg")]},
    "folder": {"prompt": "?", "media": "."},
    "device": {"prompt": "?", "media": {"type": "image", "uri": Path("/dev/zero")}},
    # Made for the test: a generator can be read once.
    "media that raise": lambda: {"prompt": "?", "media": media_that_end_early()},
    "nothing": None,
    "text": "What is it?",
    "too large": {"prompt": "?", "media": b"\xff\xd8\xff" + bytes(2**20)},
}


@pytest.mark.parametrize("odd", ODD)
def test_odd_job_is_refused_alone(redis: Redis, redis_url: str, odd: str) -> None:
    jobs = [{"prompt": str(number)} for number in range(NUM_JOBS)]
    with Client(redis_url) as client:
        job = ODD[odd]() if callable(ODD[odd]) else ODD[odd]
        answers = client.submit_many([*jobs[:PLACE], job, *jobs[PLACE + 1 :]])
    assert isinstance(answers[PLACE], InvalidJob)
    str(answers[PLACE]).encode()
    assert [type(answer) for answer in answers].count(Job) == NUM_JOBS - 1
    prompts = [
        json.loads(redis.hget(keys.record(a.id), "sealed"))["job"]["prompt"] for a in answers if isinstance(a, Job)
    ]
    assert prompts == [str(number) for number in range(NUM_JOBS) if number != PLACE]


def test_copy_with_a_word_for_an_enum_is_queued(redis_url: str) -> None:
    with Client(redis_url) as client:
        (answer,) = client.submit_many([GOOD.model_copy(update={"priority": "high"})])
        assert isinstance(answer, Job)
        assert answer.state is JobState.QUEUED


def test_jobs_before_a_generator_raised_are_queued_and_their_handles_returned(redis_url: str) -> None:
    def jobs() -> Iterator[dict[str, Any]]:
        for number in range(PLACE):
            yield {"prompt": str(number)}
        raise ValueError("row 334 is odd")

    with Client(redis_url) as client:
        *answers, last = client.submit_many(jobs())
        assert {answer.state for answer in answers} == {JobState.QUEUED}
    assert len(answers) == PLACE
    assert isinstance(last, InvalidJob)
    assert "ValueError: row 334 is odd" in str(last)
    assert isinstance(last.__cause__, ValueError)


def test_upload_that_fails_costs_one_job_its_place(
    redis: Redis, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = b"\xff\xd8\xff" + bytes(2**20)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "no address")
    for endpoint in ("http://127.0.0.1:9", None):
        settings = Settings(redis_url=SecretStr(redis_url), upload_prefix="s3://b/c", s3_endpoint_url=endpoint)
        with Client(settings) as client:
            first, failed, last = client.submit_many([GOOD, {"prompt": "?", "media": large}, GOOD])
        assert (type(first), type(failed), type(last)) == (Job, UploadFailed, Job)


def test_nothing_is_uploaded_for_a_job_that_is_faulty(redis_url: str) -> None:
    # Its store is away, which would be told first.
    settings = Settings(redis_url=SecretStr(redis_url), upload_prefix="s3://b/c", s3_endpoint_url="http://127.0.0.1:9")
    with Client(settings) as client, pytest.raises(InvalidJob, match=r"^1 fault: max_attempts"):
        client.submit(prompt="?", media=b"\xff\xd8\xff" + bytes(2**20), max_attempts=0)


def test_odd_line_of_many_costs_its_neighbours_nothing(redis_url: str) -> None:
    lines = [b'{"prompt": "a"}', b"\xff", b"[" * 10**5, json.dumps({"prompt": HALF}).encode(), b'{"prompt": "b"}']
    answer = CliRunner().invoke(app, ["submit-many", "-", "--redis-url", redis_url], input=b"\n".join(lines))
    assert [bool(line) for line in answer.stdout.split("\n")[:5]] == [True, False, False, False, True]
    assert [line.partition(":")[0] for line in answer.stderr.splitlines()] == ["line 2", "line 3", "line 4"]
