"""The sealed job and the published schemas: what producers in any language may rely on."""

import json
from pathlib import Path
from typing import Any

import pytest

from keye.config.faults import InvalidJob, UnknownSchemaVersion
from keye.config.job import AnalysisJob, GenerationOptions, ImagePart, VideoPart
from keye.config.wire import SCHEMA_VERSION, open_sealed, schemas, seal

SCHEMA_FOLDER = Path(__file__).resolve().parents[2] / "docs" / "schemas"

FULL_JOB = AnalysisJob.model_validate(
    {
        "messages": [
            {"role": "system", "content": "Answer briefly."},
            {
                "role": "user",
                "content": [
                    {"type": "video", "uri": "s3://b/k.mp4", "content": "action", "start_seconds": 1.5},
                    {"type": "image", "uri": "/data/猫.png", "resized_height": 280, "resized_width": 560},
                    {"type": "text", "text": "画面里有什么"},
                ],
            },
        ],
        "thinking": "no_think",
        "generation": {"max_new_tokens": 7, "temperature": 0, "stop": ["\n"], "seed": 2**62},
        "priority": "high",
        "deadline_seconds": 12.5,
        "idempotency_key": "order 7",
        "metadata": {"nested": [1, None, {"x": True}]},
    }
)


def sealed_json(**job_fields: Any) -> dict[str, Any]:
    return {"schema_version": SCHEMA_VERSION, "job_id": "1", "submitted_at": 0, "job": {"prompt": "?"} | job_fields}


@pytest.mark.parametrize(
    "job",
    [
        AnalysisJob(prompt="?"),
        AnalysisJob(prompt="?", media=(ImagePart(uri="/a.png"), VideoPart(uri="file:///b.mp4", fps=0.5))),
        AnalysisJob(prompt="?", generation=GenerationOptions(stop=("a", "b"))),
        FULL_JOB,
    ],
)
def test_a_sealed_job_comes_back_as_it_was(job: AnalysisJob) -> None:
    sealed = seal(job)
    assert open_sealed(json.loads(sealed.model_dump_json())) == sealed


def test_a_job_with_nothing_but_a_prompt_is_complete() -> None:
    assert open_sealed(sealed_json()).job == AnalysisJob(prompt="?")


@pytest.mark.parametrize("version", [0, SCHEMA_VERSION + 1])
def test_another_schema_version_is_named_before_any_other_fault(version: int) -> None:
    with pytest.raises(UnknownSchemaVersion, match=f"version {version}"):
        open_sealed({"schema_version": version, "anything": "else"})


def test_every_fault_is_listed_with_its_place() -> None:
    media = [{"type": "image", "uri": "ftp://a"}, {"type": "video", "uri": "/a", "fps": 2, "content": "hd"}]
    with pytest.raises(InvalidJob) as refused:
        open_sealed(sealed_json(media=media, max_attempts=0, colour="red"))
    message = str(refused.value)
    assert message.startswith("4 faults")
    assert all(place in message for place in ("job.media.0", "job.media.1", "job.max_attempts", "job.colour"))


@pytest.mark.parametrize("payload", [None, [], "job", 7, {}, {"schema_version": "one"}])
def test_a_payload_that_is_no_sealed_job_is_an_invalid_job(payload: Any) -> None:
    with pytest.raises(InvalidJob, match="fault"):
        open_sealed(payload)


@pytest.mark.parametrize("field", ["prompt", "max_attempts", "metadata", "media"])
def test_values_of_another_type_are_refused_not_converted(field: str) -> None:
    with pytest.raises(InvalidJob, match=field):
        open_sealed(
            sealed_json(**{field: {"prompt": 7, "max_attempts": "3", "metadata": [], "media": "/a.png"}[field]})
        )


def test_a_refusal_does_not_repeat_what_the_caller_sent() -> None:
    with pytest.raises(InvalidJob) as refused:
        open_sealed(sealed_json(idempotency_key=["https://b/k?X-Amz-Signature=secret"]))
    assert "secret" not in str(refused.value)


@pytest.mark.holds(
    "docs/producers.md#from-any-language", "The JSON Schemas of what you send and read", "`keye schema` prints those"
)
@pytest.mark.parametrize("name", sorted(schemas()))
def test_the_published_schemas_are_the_ones_in_force(name: str) -> None:
    published = json.loads((SCHEMA_FOLDER / f"{name}.json").read_text())
    assert published == schemas()[name], "run `keye schema --write docs/schemas` and name the change in CHANGELOG.md"


def test_no_schema_is_published_that_is_not_in_force() -> None:
    assert {path.stem for path in SCHEMA_FOLDER.glob("*.json")} == set(schemas())
