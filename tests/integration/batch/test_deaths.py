"""Whoever runs a batch is killed wherever it hurts: each line ends once, is written once, and its job runs once."""

import json
import signal
from collections import Counter
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.integration.batch.conftest import Answering
from tests.integration.batch.mortal import run
from tests.support.scale import SCALE, SHORT

KILLED = -signal.SIGKILL


def openai(custom_id: str, prompt: str) -> dict[str, Any]:
    body = {"model": "keye", "messages": [{"role": "user", "content": prompt}]}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def lines(run: object) -> list[Any]:
    twin = {"prompt": "six", "idempotency_key": f"twins of {run}"}
    return [
        {"custom_id": "twin", **twin},
        {"custom_id": "other twin", **twin},
        {"custom_id": "a", "prompt": "one"},
        {"custom_id": "b", "prompt": "fail"},
        openai("c", "three"),
        {"prompt": "four"},
        "no JSON object",
        {"custom_id": "a", "prompt": "eight"},
        openai("c", "nine"),
        openai("d", "fail"),
        {"custom_id": "e", "prompt": "eleven"},
        {"custom_id": "f", "prompt": "twelve", "media": 7},
        {"custom_id": "g", "prompt": "thirteen"},
    ]


ANSWERED = ["twin", "other twin", "a", "c", "line-6", "e", "g"]
# Of those whose custom_id is another's too, or that have none: None.
FAILED = ["b", None, None, None, "d", "f"]


def begin(folder: Path) -> Path:
    folder.mkdir()
    (folder / "in.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines(folder)))
    return folder


def custom_ids(path: Path) -> Counter[str | None]:
    return Counter(json.loads(line)["custom_id"] for line in path.read_text().splitlines())


def is_whole(folder: Path) -> bool:
    found = custom_ids(folder / "out.jsonl"), custom_ids(folder / "out.errors.jsonl")
    return found == (Counter(ANSWERED), Counter(FAILED))


@pytest.mark.holds(
    "docs/batches.md#what-does-it-write",
    "Nothing else that was sent is ever sent as another job",
)
@pytest.mark.holds(
    "docs/batches.md#what-if-something-dies",
    "A job is in it before it is sent, under an id of its own",
)
@pytest.mark.holds(
    "docs/design.md#decisions",
    "Before a line is sent it stands in the journal",
    "An end counts once its line is on the disk",
)
@pytest.mark.parametrize(("retry_failed", "min_steps"), [(False, 50), (True, 20)], ids=["first run", "retry"])
def test_each_line_ends_once_whatever_step_the_runner_dies_before(
    answering: Answering, redis_url: str, tmp_path: Path, retry_failed: bool, min_steps: int
) -> None:
    for step in count(1):
        folder = begin(tmp_path / str(step))
        assert not retry_failed or run(redis_url, folder) == 0
        if (code := run(redis_url, folder, step=step, retry_failed=retry_failed)) == 0:
            break
        assert code == KILLED
        assert run(redis_url, folder) == 0
        assert is_whole(folder), step
    assert is_whole(folder)
    assert step > min_steps
    assert set(answering.times.values()) == {1}


@pytest.mark.skipif(SCALE is SHORT, reason="one of the long ones of make soak")
def test_each_line_ends_once_in_whatever_line_of_code_the_runner_dies(
    answering: Answering, redis_url: str, tmp_path: Path
) -> None:
    died_at = tmp_path / "died_at"
    died_at.touch()
    for number in count():
        folder = begin(tmp_path / str(number))
        num_deaths = 0
        while (code := run(redis_url, folder, died_at=died_at)) == KILLED:
            num_deaths += 1
        assert code == 0
        assert is_whole(folder), died_at.read_text().split()[-num_deaths:]
        if not num_deaths:
            break
    assert died_at.read_text().count("batch.py") > 150
    assert set(answering.times.values()) == {1}
