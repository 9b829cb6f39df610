"""How much a job may hold, and what may be its id: told alike to who builds a job and to who reads one."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from keye.config.faults import InvalidJob
from keye.config.job import (
    MAX_INLINE_URI_CHARS,
    MAX_MEDIA,
    MAX_METADATA_BYTES,
    MAX_TEXT_BYTES,
    MAX_URI_BYTES,
    AnalysisJob,
    is_job_id,
)
from keye.config.wire import MAX_SEALED_BYTES, SealedJob, open_sealed, seal
from keye.producer.client import build_job

Fields = dict[str, Any]
MAX_ONE_URI_CHARS = 4 * 2**20
# A mebibyte as base64, its padding included.
MAX_SENT_URI_CHARS = len("data:image/png;base64,") + 4 * -(-(2**20) // 3)
MAX_STOP = 8


def sealed_json(fields: Fields, job_id: Any = "job-7") -> Fields:
    return {"schema_version": 1, "job_id": job_id, "submitted_at": 0, "job": fields}


def read(fields: Fields) -> AnalysisJob:
    """As a worker does, from what any producer may have written."""
    return open_sealed(sealed_json(fields)).job


def cats(num_bytes: int) -> str:
    return "猫" * (num_bytes // 3) + "x" * (num_bytes % 3)


def asking(*uris: str) -> Fields:
    return {"prompt": "?", "media": [{"type": "image", "uri": uri} for uri in uris]}


def chat(*texts: str) -> Fields:
    parts = [{"type": "text", "text": text} for text in texts[1:]]
    return {"messages": [{"role": "system", "content": texts[0]}, {"role": "user", "content": parts}]}


def inline(num_chars: int) -> str:
    return "data:image/png;base64,".ljust(num_chars, "A")


# name: (limit, fields of a job that has so much)
BOUNDS: dict[str, tuple[int, Callable[[int], Fields]]] = {
    "prompt": (MAX_TEXT_BYTES, lambda n: {"prompt": "x" * n}),
    "prompt in bytes": (MAX_TEXT_BYTES, lambda n: {"prompt": cats(n)}),
    "all texts of a chat": (MAX_TEXT_BYTES, lambda n: chat(cats(9), "x" * 9, "y" * (n - 18))),
    "prompt and stop": (MAX_TEXT_BYTES, lambda n: {"prompt": "x" * (n - 99), "generation": {"stop": ["y" * 99]}}),
    "stop": (MAX_STOP, lambda n: {"prompt": "?", "generation": {"stop": ["y"] * n}}),
    "media": (MAX_MEDIA, lambda n: asking(*["/a.png"] * n)),
    "media of a chat": (
        MAX_MEDIA,
        lambda n: {"messages": [{"role": "user", "content": [{"type": "image", "uri": "/a.png"}] * n}]},
    ),
    "path": (MAX_URI_BYTES, lambda n: asking("/" + "x" * (n - 1))),
    "path in bytes": (MAX_URI_BYTES, lambda n: asking("/" + cats(n - 1))),
    "S3 key": (MAX_URI_BYTES, lambda n: asking("s3://bucket/".ljust(n, "x"))),
    "https URL": (MAX_URI_BYTES, lambda n: asking("https://host/".ljust(n, "x"))),
    "all data URIs": (MAX_INLINE_URI_CHARS, lambda n: asking(*[inline(2**20)] * 11, inline(n - 11 * 2**20))),
    "metadata": (MAX_METADATA_BYTES, lambda n: {"prompt": "?", "metadata": {"a": "x" * (n - 9)}}),
    # As ASCII: six bytes for each of those characters.
    "metadata of another alphabet": (
        MAX_METADATA_BYTES,
        lambda n: {"prompt": "?", "metadata": {"a": "猫" * ((n - 9) // 6) + "x" * ((n - 9) % 6)}},
    ),
}


@pytest.mark.holds(
    "docs/producers.md#how-much-a-job-may-hold", "What is above a bound is an `InvalidJob`", "what | at most"
)
@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("opened_by", [read, build_job])
def test_job_at_its_bound_is_taken_and_one_above_is_refused(opened_by: Callable[[Fields], Any], bound: str) -> None:
    limit, holding = BOUNDS[bound]
    job = opened_by(holding(limit))
    assert open_sealed(json.loads(seal(job).model_dump_json())).job == job
    with pytest.raises(InvalidJob, match="1 fault") as refused:
        opened_by(holding(limit + 1))
    assert len(str(refused.value)) < 500, "it does not repeat what was sent"


@pytest.mark.parametrize(("opened_by", "limit"), [(read, MAX_ONE_URI_CHARS), (build_job, MAX_SENT_URI_CHARS)])
def test_data_uri_is_held_by_who_builds_a_job_to_what_workers_take(
    opened_by: Callable[[Fields], AnalysisJob], limit: int
) -> None:
    assert len(opened_by(asking(inline(limit))).media[0].uri) == limit
    with pytest.raises(InvalidJob, match="1 fault"):
        opened_by(asking(inline(limit + 1)))


def test_job_within_each_bound_that_is_too_large_as_json_is_refused_by_the_seal() -> None:
    """JSON writes six bytes for a control character."""
    fields = asking(*[inline(2**20)] * 12) | {"prompt": "\0" * MAX_TEXT_BYTES}
    job = build_job(fields)
    with pytest.raises(InvalidJob, match=rf"1 fault: job: \d+ bytes of JSON, the limit is {MAX_SEALED_BYTES}$"):
        seal(job)
    with pytest.raises(InvalidJob, match=f"limit is {MAX_SEALED_BYTES}$"):
        read(fields)


@pytest.mark.parametrize("size", [MAX_SEALED_BYTES, MAX_SEALED_BYTES + 1])
def test_sealed_job_is_measured_before_it_is_looked_at(size: int) -> None:
    around = len(json.dumps(sealed_json({"prompt": "?", "x": ""}), separators=(",", ":")))
    with pytest.raises(InvalidJob) as refused:
        read({"prompt": "?", "x": "y" * (size - around)})
    assert ("bytes of JSON" in str(refused.value)) == (size > MAX_SEALED_BYTES)


def nested(depth: int) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = [value]
    return value


HALF = "half \ud83d"
NO_JSON = {
    "NaN": float("nan"),
    "infinity": float("inf"),
    "negative infinity": float("-inf"),
    "half a character": HALF,
    "other half": "\udc31",
    "half as key": {HALF: 1},
    "half inside": [{"a": [HALF]}],
    "deeply nested": nested(100_000),
}


@pytest.mark.parametrize("value", NO_JSON.values(), ids=NO_JSON)
@pytest.mark.parametrize("place", ["metadata", "prompt", "stop", "text of a chat", "uri", "idempotency_key"])
@pytest.mark.parametrize("opened_by", [read, build_job])
def test_what_json_cannot_hold_is_a_fault_of_the_job(
    opened_by: Callable[[Fields], Any], place: str, value: Any
) -> None:
    fields: Fields = {
        "metadata": {"prompt": "?", "metadata": {"a": value}},
        "prompt": {"prompt": value},
        "stop": {"prompt": "?", "generation": {"stop": ["a", value]}},
        "text of a chat": {"messages": [{"role": "user", "content": [{"type": "text", "text": value}]}]},
        "uri": asking(f"/{value}" if isinstance(value, str) else value),
        "idempotency_key": {"prompt": "?", "idempotency_key": value},
    }[place]
    with pytest.raises(InvalidJob, match=r"^\d fault") as refused:
        seal(opened_by(fields))
    assert "half \\" not in str(refused.value)
    str(refused.value).encode()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("field", ["temperature", "top_p", "repetition_penalty"])
def test_number_that_is_none_is_no_option(field: str, value: float) -> None:
    for opened_by in (read, build_job):
        with pytest.raises(InvalidJob, match=field):
            opened_by({"prompt": "?", "generation": {field: value}})


def test_metadata_keys_count_and_may_be_of_any_language() -> None:
    assert build_job({"prompt": "?", "metadata": {"ключ": "значение"}}).metadata == {"ключ": "значение"}
    with pytest.raises(InvalidJob, match="metadata"):
        build_job({"prompt": "?", "metadata": {"k" * MAX_METADATA_BYTES: 1}})


GOOD_IDS = ["1", "job-7", "a.b:c_D-9", "x" * 128, "events", ":events:", "0f9fcd66-f1f9-4ad3-a902-1da28c23a7f0"]
BAD_IDS: dict[str, Any] = {
    "129 characters": "x" * 129,
    "1 MB": "x" * 2**20,
    "empty": "",
    "line break behind it": "job-7\n",
    "line break": "job\n7",
    "NUL": "job\0",
    "events of another": "x:events",
    "only events": ":events",
    "pattern": "*",
    "hash tag of a cluster": "{a}",
    "space": "job 7",
    "slash": "../7",
    "letters of another alphabet": "работа",
    "digits of another alphabet": "٣",
    "half a character": "\ud83d",
    "number": 7,
    "nothing": None,
    "list": ["job-7"],
}


@pytest.mark.holds("docs/producers.md#from-any-language", "`<id>` may be any 1 to 128 letters")
@pytest.mark.parametrize("job_id", GOOD_IDS)
def test_id_that_is_of_the_kind_is_taken(job_id: str) -> None:
    assert is_job_id(job_id)
    assert open_sealed(sealed_json({"prompt": "?"}, job_id)).job_id == job_id


@pytest.mark.parametrize("job_id", BAD_IDS.values(), ids=BAD_IDS)
def test_any_other_id_is_refused(job_id: Any) -> None:
    assert not is_job_id(job_id)
    with pytest.raises(InvalidJob) as refused:
        open_sealed(sealed_json({"prompt": "?"}, job_id))
    assert len(str(refused.value)) < 300


def test_ids_that_are_made_here_are_of_the_kind() -> None:
    sealed = seal(AnalysisJob(prompt="?"))
    assert is_job_id(sealed.job_id)
    assert isinstance(sealed, SealedJob)


def test_no_fault_quotes_what_was_given() -> None:
    given = "https://host/cat.jpg?X-Amz-Signature=abc"
    parts = [{"type": given, "uri": "/a.png"}, {"type": "image", "uri": given.replace("https", "ftp")}]
    job = {"prompt": 5, "media": parts, "thinking": given, "priority": given, "generation": {"stop": given}}
    with pytest.raises(InvalidJob) as refused:
        open_sealed({"schema_version": 1, "job_id": "a", "submitted_at": given, "job": job})
    assert given[8:] not in str(refused.value)
    assert "type is none of 'image', 'video'" in str(refused.value)
