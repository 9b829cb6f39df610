"""Names that people bring along from elsewhere: each is refused with what to write instead, at every door."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from typer.testing import CliRunner

from keye.config.familiar_names import OF_A_JOB, OF_A_WORKER
from keye.config.settings import Settings
from keye.config.wire import open_sealed
from keye.producer import AnalysisJob, GenerationOptions, ImagePart, InvalidJob, VideoPart
from keye.producer.cli import app
from keye.producer.client import Client

# No Redis is there: a job that gets as far has found nothing to say.
CLIENT = Client("redis://127.0.0.1:9/0")


def by_shell(**fields: Any) -> None:
    env = {"KEYE_REDIS_URL": "redis://127.0.0.1:9/0"}
    raise InvalidJob(CliRunner().invoke(app, ["submit", "--job", "-"], input=json.dumps(fields), env=env).stderr)


def by_message(**fields: Any) -> None:
    """As from another language, or by Celery."""
    open_sealed({"schema_version": 1, "job_id": "1", "submitted_at": 1.0, "job": fields})


Door = Callable[..., object]
DOORS: list[Door] = [CLIENT.submit, AnalysisJob, by_shell, by_message]


def refused(make: Door, **fields: Any) -> str:
    with pytest.raises(InvalidJob) as refused:
        make(**fields)
    return str(refused.value).strip()


@pytest.mark.holds("docs/producers.md#what-can-be-raised", "are refused with what to write instead")
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("name", "value", "instead"),
    [
        ("do_sample", False, "temperature, in generation, says it: 0 is greedy, above 0 draws"),
        ("thinking_mode", "think", 'it is thinking: "auto", "think" or "no_think"'),
        ("enable_thinking", True, 'it is thinking: "auto", "think" or "no_think"'),
        ("thinking_budget", 9, "max_thinking_tokens, in generation"),
        ("chat_template_kwargs", {}, 'it is thinking: "auto", "think" or "no_think"'),
        ("max_tokens", 9, "max_new_tokens, in generation"),
        ("max_length", 9, "max_new_tokens, in generation"),
        ("num_beams", 4, "no beam search"),
        ("eos_token_id", 4, "the checkpoint's"),
        ("image", "/a.png", "images and videos are media"),
        ("images", [], "images and videos are media"),
        ("video", "/a.mp4", "images and videos are media"),
        ("videos", [], "images and videos are media"),
        ("guided_json", {}, "response_schema: a JSON Schema, a regular expression or a list of choices"),
        ("response_format", {"type": "json_object"}, "response_schema: a JSON Schema"),
        ("schema", {}, "response_schema: a JSON Schema"),
        ("num_return_sequences", 2, "n, in generation"),
        ("min_new_tokens", 2, "min_tokens, in generation"),
        ("top_logprobs", 5, "logprobs, in generation"),
        ("prompts", ["?"], 'are questions, as in [{"prompt": "What is it?"}]'),
        ("text", "?", "the question is prompt"),
        ("question", "?", "the question is prompt"),
        ("nframes", 8, "max_frames"),
        ("num_frames", 8, "max_frames"),
        ("min_frames", 8, "max_frames"),
        ("load_in_8bit", True, "KEYE_PRECISION=int8"),
        ("load_in_4bit", True, "KEYE_PRECISION=int4"),
        ("torch_dtype", "auto", "KEYE_PRECISION=bfloat16"),
        ("attn_implementation", "flash_attention_2", "leave it out"),
        ("device_map", "auto", "KEYE_DEVICE=cuda"),
        ("device", "cuda", "KEYE_DEVICE"),
        ("trust_remote_code", True, "no code from a checkpoint is executed"),
        ("batch_size", 4, "submit them all"),
        *((name, 1, "it stands in generation, as in") for name in GenerationOptions.model_fields),
        ("fps", 1, 'it stands in a video of media, as in {"type": "video"'),
        ("max_pixels", 1, "it stands in a part of media"),
        ("uri", "/a.png", "it stands in a part of media"),
        ("role", "user", "it stands in a message"),
    ],
)
def test_a_name_from_elsewhere_is_refused_with_what_to_write_instead(
    door: Door, name: str, value: Any, instead: str
) -> None:
    place = f"job.{name}" if door is by_message else name
    sentence = refused(door, prompt="?", **{name: value})
    assert sentence.startswith(f"1 fault: {place}: is no field here: ")
    assert instead in sentence


@pytest.mark.parametrize("name", ["do_sample", "max_tokens", "thinking_budget", "load_in_8bit", "num_beams"])
def test_it_is_told_within_generation_too(name: str) -> None:
    for make in (lambda **given: AnalysisJob(prompt="?", generation=given), GenerationOptions):
        assert f"{name}: is no field here: {OF_A_JOB[name]}" in refused(make, **{name: 1})
    told = refused(GenerationOptions, thinking="think")
    assert "thinking: is no field here: it stands in " in told
    assert "the job itself" in told


@pytest.mark.parametrize("make", [ImagePart, VideoPart])
def test_it_is_told_of_a_part_too(make: type[ImagePart]) -> None:
    assert "image: is no field here: did you mean uri?" in refused(make, image="/a.png")
    assert "nframes: is no field here: fps of a video's part" in refused(make, uri="/a", nframes=8)
    (part,) = [{"type": "video", "video": "/a.mp4", "nframes": 8}]
    told = refused(AnalysisJob, messages=[{"role": "user", "content": [part]}])
    assert "video.video: is no field here: did you mean uri?" in told
    assert "max_frames" in told


@pytest.mark.parametrize("door", [CLIENT.submit, AnalysisJob, by_shell, by_message])
@pytest.mark.parametrize("value", ["no-think", "/think", "Think", True, False, None, 1])
def test_a_wrong_way_to_think_is_refused_with_those_there_are(door: Door, value: Any) -> None:
    assert "thinking: Input should be 'auto', 'think' or 'no_think'" in refused(door, prompt="?", thinking=value)


def test_what_is_written_instead_is_there() -> None:
    """The table names no setting and no field that has gone, and takes no name that is understood."""
    job = {name for model in (AnalysisJob, GenerationOptions, VideoPart) for name in model.model_fields}
    assert not OF_A_JOB.keys() & job
    assert not OF_A_WORKER.keys() & Settings.model_fields.keys()
    told = " ".join(OF_A_JOB.values())
    settings = {name.lower() for name in re.findall(r"\bKEYE_([A-Z_]+)", told)}
    settings |= set(re.findall(r"([a-z_]+)=\"", told))
    assert settings <= Settings.model_fields.keys()
    assert set(re.findall(r"\b[a-z]+_[a-z_]+\b", told)) - settings <= job | {"no_think"}
