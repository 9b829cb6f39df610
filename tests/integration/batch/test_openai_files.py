"""Batch files as the `openai` package's own types make them, answered by lines that its own models read."""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from openai import omit
from openai.lib._parsing import parse_chat_completion, type_to_response_format_param
from openai.types.chat import ChatCompletion, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming
from openai.types.completion_usage import CompletionUsage, PromptTokensDetails
from openai.types.shared import ErrorObject
from pydantic import BaseModel

from keye.config.codes import ErrorCode
from keye.config.job import AnalysisJob, ChatMessage, GenerationOptions, ImagePart, TextPart, Thinking, VideoPart
from keye.producer.batch.source import JsonLines
from keye.producer.testing import MemoryClient

URL = "/v1/chat/completions"
PICTURE = f"data:image/png;base64,{base64.b64encode(b'PNG').decode()}"


def line(custom_id: str, body: Any, **others: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": URL, "body": body, **others}


def ask(*content: Any, **options: Any) -> dict[str, Any]:
    return {"model": "gpt-4o", "messages": [{"role": "user", "content": list(content) or "?"}], **options}


Run = Callable[..., tuple[list[AnalysisJob], list[dict[str, Any]], list[dict[str, Any]]]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Gives the jobs that lines became, and the lines of the output and of the errors."""

    def run(
        *lines: dict[str, Any] | str, reply: Any = lambda job: "a cat", prompt: str | None = None
    ) -> tuple[list[AnalysisJob], list[dict[str, Any]], list[dict[str, Any]]]:
        given, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        given.write_text("".join(f"{each if isinstance(each, str) else json.dumps(each)}\n" for each in lines))
        client = MemoryClient(reply)
        client.submit_batch(given, output, prompt).wait(30)
        jobs = [client.asked(job) for job in client.jobs]
        return jobs, *(read(path) for path in (output, tmp_path / "out.errors.jsonl"))

    return run


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.holds(
    "docs/batches.md#what-can-the-input-be",
    "JSON lines for OpenAI's batches |",
)
@pytest.mark.holds(
    "docs/batches.md#what-does-it-write",
    "its `response.body` is a `chat.completion`",
)
def test_a_file_of_the_package_is_taken_and_its_models_read_the_answers(run: Run) -> None:
    request = CompletionCreateParamsNonStreaming(
        model="gpt-4o-mini",
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "system", "content": [{"type": "text", "text": "Be kind."}]},
            {
                "role": "user",
                "name": "Ann",
                "content": [
                    {"type": "text", "text": "What is it?"},
                    {"type": "image_url", "image_url": {"url": "https://host/1?sig=%2B", "detail": "low"}},
                    {"type": "image_url", "image_url": {"url": PICTURE, "detail": "auto"}},
                ],
            },
            {"role": "assistant", "content": "A cat.", "refusal": None, "tool_calls": [], "audio": None},
            {"role": "user", "content": "Which colour?"},
        ],
        max_completion_tokens=64,
        temperature=0.5,
        top_p=0.9,
        stop="\n\n",
        seed=7,
        n=1,
        stream=False,
        logprobs=False,
        top_logprobs=None,
        frequency_penalty=0,
        presence_penalty=0.0,
        logit_bias={},
        response_format={"type": "text"},
        modalities=["text"],
        tool_choice="none",
        parallel_tool_calls=True,
        metadata={"owner": "Ann"},
        reasoning_effort="minimal",
        user="u",
        store=False,
        service_tier="auto",
        safety_identifier="s",
        prompt_cache_key="k",
        verbosity="medium",
    )
    (job,), (answer,), errors = run(line("request-1", request))
    low, picture = ImagePart(uri="https://host/1?sig=%2B", max_pixels=512 * 512), ImagePart(uri=PICTURE)
    assert job == AnalysisJob(
        messages=(
            ChatMessage(role="system", content="Be brief."),
            ChatMessage(role="system", content=(TextPart(text="Be kind."),)),
            ChatMessage(role="user", content=(TextPart(text="What is it?"), low, picture)),
            ChatMessage(role="assistant", content="A cat."),
            ChatMessage(role="user", content="Which colour?"),
        ),
        generation=GenerationOptions(max_new_tokens=64, temperature=0.5, top_p=0.9, stop=("\n\n",), seed=7),
        metadata={"owner": "Ann"},
        thinking=Thinking.NO_THINK,
        priority="low",
    )
    assert errors == []
    assert answer.keys() == {"id", "custom_id", "response", "error"}
    assert (answer["custom_id"], answer["error"], answer["response"]["status_code"]) == ("request-1", None, 200)
    completion = ChatCompletion.model_validate(answer["response"]["body"], strict=True)
    assert completion.model_dump(exclude_unset=True) == answer["response"]["body"]
    assert completion.choices == [
        Choice(
            index=0,
            finish_reason="stop",
            logprobs=None,
            message=ChatCompletionMessage(role="assistant", content="a cat", refusal=None),
        )
    ]
    cached = PromptTokensDetails(cached_tokens=0)
    assert completion.usage == CompletionUsage(
        prompt_tokens=0, completion_tokens=2, total_tokens=2, prompt_tokens_details=cached
    )


def test_each_of_several_answers_is_a_choice_with_its_logprobs(run: Run) -> None:
    reply = ["a cat", ErrorCode.OUT_OF_MEMORY, "猫 🐈"]
    _, (answer,), errors = run(line("1", ask(n=3, logprobs=True)), reply=lambda job: reply)
    assert errors == []
    completion = ChatCompletion.model_validate(answer["response"]["body"], strict=True)
    assert completion.model_dump(exclude_unset=True) == answer["response"]["body"]
    # One that could not be given is not there, and the others stay what they are.
    assert [(choice.index, choice.message.content) for choice in completion.choices] == [(0, "a cat"), (2, "猫 🐈")]
    for choice in completion.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        tokens = [each.bytes for each in choice.logprobs.content]
        assert b"".join(bytes(each or ()) for each in tokens).decode() == choice.message.content
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 4


class Colour(BaseModel):
    """As programs of the package have it."""

    colour: Literal["red", "blue"]
    where: str | None


def test_what_the_package_makes_of_a_model_is_the_schema_and_its_model_reads_the_answer(run: Run) -> None:
    response_format = type_to_response_format_param(Colour)
    told = '{"colour": "red", "where": null}'
    (job,), (answer,), errors = run(line("1", ask(response_format=response_format)), reply=lambda job: told)
    assert errors == []
    assert isinstance(job.response_schema, dict)
    assert job.response_schema["required"] == ["colour", "where"]
    completion = ChatCompletion.model_validate(answer["response"]["body"])
    parsed = parse_chat_completion(response_format=Colour, input_tools=omit, chat_completion=completion)
    assert parsed.choices[0].message.parsed == Colour(colour="red", where=None)


def test_what_was_answered_can_be_asked_about(run: Run) -> None:
    """Programs put the message that they were given into the next request as it is."""
    answer = ChatCompletionMessage.model_validate({"role": "assistant", "content": "A", "reasoning_content": "Hm"})
    body = ask()
    body["messages"] = [*body["messages"], answer.model_dump(), {"role": "user", "content": "Why?"}]
    (job,), _, errors = run(line("1", body))
    assert errors == []
    assert job.messages is not None
    assert job.messages[1] == ChatMessage(role="assistant", content="A")


PARTS: list[tuple[dict[str, Any], ImagePart | VideoPart | TextPart]] = [
    ({"type": "image_url", "image_url": "s3://b/1"}, ImagePart(uri="s3://b/1")),
    ({"type": "image_url", "image_url": {"url": "s3://b/1"}, "uuid": "u"}, ImagePart(uri="s3://b/1")),
    ({"type": "image_url", "image_url": {"url": "s3://b/1", "detail": "high"}}, ImagePart(uri="s3://b/1")),
    ({"type": "input_image", "image_url": "s3://b/1", "detail": "auto"}, ImagePart(uri="s3://b/1")),
    ({"type": "image", "image": "s3://b/1"}, ImagePart(uri="s3://b/1")),
    ({"type": "image", "uri": "s3://b/1"}, ImagePart(uri="s3://b/1")),
    (
        {"type": "image_url", "image_url": {"url": "file:///1"}, "max_pixels": 784},
        ImagePart(uri="file:///1", max_pixels=784),
    ),
    ({"type": "video_url", "video_url": {"url": "s3://b/1"}}, VideoPart(uri="s3://b/1")),
    ({"type": "video_url", "video_url": {"url": "s3://b/1"}, "fps": 1}, VideoPart(uri="s3://b/1", fps=1)),
    ({"type": "video_url", "video_url": {"url": "s3://b/1", "fps": 1}}, VideoPart(uri="s3://b/1", fps=1)),
    ({"type": "video", "video": "s3://b/1", "max_frames": 8}, VideoPart(uri="s3://b/1", max_frames=8)),
    ({"type": "input_text", "text": "!"}, TextPart(text="!")),
    ({"type": "text", "text": "!", "prompt_cache_breakpoint": {"mode": "explicit"}}, TextPart(text="!")),
]


def test_parts_of_a_message_may_be_written_as_others_write_them(run: Run) -> None:
    jobs, _, errors = run(*(line(str(number), ask(part)) for number, (part, _) in enumerate(PARTS)))
    assert errors == []
    assert [job.all_parts() for job in jobs] == [(part,) for _, part in PARTS]


COLOUR = {"type": "object", "properties": {"colour": {"type": "string"}}, "required": ["colour"]}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "colour", "schema": COLOUR, "strict": True}}
OPTIONS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"max_tokens": 5}, {"generation": {"max_new_tokens": 5}}),
    ({"stop": ["a", "b"]}, {"generation": {"stop": ("a", "b")}}),
    ({"stop": None, "seed": None, "temperature": None}, {}),
    ({"top_k": 20, "repetition_penalty": 1.05}, {"generation": {"top_k": 20, "repetition_penalty": 1.05}}),
    ({"top_k": -1, "min_p": 0.0, "ignore_eos": False, "skip_special_tokens": True}, {"generation": {"top_k": 0}}),
    ({"extra_body": {"top_k": 20}, "seed": 1}, {"generation": {"top_k": 20, "seed": 1}}),
    ({"extra_body": {}}, {}),
    ({"chat_template_kwargs": {"enable_thinking": False}}, {"thinking": "no_think"}),
    ({"extra_body": {"chat_template_kwargs": {"enable_thinking": True}}}, {"thinking": "think"}),
    ({"reasoning_effort": "none"}, {"thinking": "no_think"}),
    ({"reasoning_effort": "high"}, {"thinking": "think"}),
    (
        {"thinking": "auto", "deadline_seconds": 60, "max_thinking_tokens": 9, "priority": "high"},
        {"deadline_seconds": 60, "generation": {"max_thinking_tokens": 9}, "priority": "high"},
    ),
    ({"n": 2, "logprobs": True, "top_logprobs": 0}, {"generation": {"n": 2, "logprobs": True}}),
    ({"min_tokens": 5, "logprobs": None}, {"generation": {"min_tokens": 5}}),
    ({"response_format": {"type": "text"}}, {}),
    ({"response_format": {"type": "json_object"}}, {"response_schema": {"type": "object"}}),
    ({"response_format": JSON_SCHEMA}, {"response_schema": COLOUR}),
    ({"response_format": {**JSON_SCHEMA, "json_schema": {"name": "any"}}}, {"response_schema": {"type": "object"}}),
    ({"guided_json": COLOUR, "guided_decoding_backend": "xgrammar"}, {"response_schema": COLOUR}),
    ({"extra_body": {"guided_json": json.dumps(COLOUR)}}, {"response_schema": COLOUR}),
    ({"guided_regex": "[a-z]+"}, {"response_schema": "[a-z]+"}),
    ({"guided_choice": ["a", "b"], "guided_json": None}, {"response_schema": ["a", "b"]}),
    ({"structured_outputs": {"json": COLOUR, "regex": None}}, {"response_schema": COLOUR}),
    ({"structured_outputs": {"choice": ["a"]}}, {"response_schema": ["a"]}),
    ({"structured_outputs": {"json_object": True}}, {"response_schema": {"type": "object"}}),
    ({"response_schema": ["a"]}, {"response_schema": ["a"]}),
    ({"priority": 0, "tools": [], "function_call": "auto", "best_of": 1, "stream_options": {}}, {}),
]


def test_options_of_openai_and_of_vllm(run: Run) -> None:
    lines = [line(str(number), ask(**options)) for number, (options, _) in enumerate(OPTIONS)]
    jobs, _, errors = run(*lines, reply=lambda job: '{"colour": "red"}')
    assert errors == []
    same = {"messages": (ChatMessage(role="user", content="?"),), "priority": "low"}
    assert jobs == [AnalysisJob.model_validate({**same, **fields}) for _, fields in OPTIONS]


def test_what_vllm_hands_to_the_processor_is_said_of_each_medium(run: Run) -> None:
    image, video = {"type": "image_url", "image_url": "s3://b/1"}, {"type": "video_url", "video_url": "s3://b/2"}
    processor = {"min_pixels": 784, "max_pixels": 3136, "fps": 1}
    body = ask(image, {**video, "fps": 4}, video, {"type": "text", "text": "?"}, mm_processor_kwargs=processor)
    (job,), _, _ = run(line("1", body))
    bounds = {"min_pixels": 784, "max_pixels": 3136}
    assert job.all_media() == (
        ImagePart(uri="s3://b/1", **bounds),
        VideoPart(uri="s3://b/2", **bounds, fps=4),
        VideoPart(uri="s3://b/2", **bounds, fps=1),
    )


def test_the_url_may_be_that_of_any_server(run: Run) -> None:
    urls = (
        f"/openai/deployments/x{URL[3:]}?api-version=1",
        URL,
        "/chat/completions",
        "chat/completions",
        f"https://api.openai.com{URL}",
        f"{URL}/",
    )
    jobs, _, errors = run(*(line(url, ask(), url=url) for url in urls))
    assert (len(jobs), errors) == (len(urls), [])


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"url": "/v1/responses", "body": {"model": "m", "input": "?"}}, "1 fault: url: is not /v1/chat/completions"),
    ({"url": "/v1/embeddings", "body": {"model": "m", "input": "?"}}, "1 fault: url: is not /v1/chat/completions"),
    ({"url": "/v1/completions", "body": {"prompt": "?"}}, "1 fault: url: is not /v1/chat/completions"),
    ({"url": None}, "url: is not"),
    ({"method": "GET"}, "method: is not POST"),
    ({"params": {}}, "params: is no field of a batch's line"),
    ({"body": "?"}, "body: Input should be an object, not text"),
    ({"body": None}, "body: Input should be an object, not nothing (null)"),
    ({"body": {"model": "m"}}, "body.messages: Field required"),
    ({"body": {"model": "m", "messages": []}}, "messages: has fewer than 1 items"),
    (
        {"body": ask(tools=[{"type": "function"}])},
        "body.tools: can only be [] here, or left out: there is nothing like",
    ),
    ({"body": ask(n=99)}, "1 fault: generation.n: Input should be less than or equal to 16"),
    ({"body": ask(best_of=2)}, "body.best_of: can only be 1 here, or left out: how many answers are drawn is n"),
    (
        {"body": ask(logprobs=True, top_logprobs=5)},
        "body.top_logprobs: can only be 0 here, or left out: there",
    ),
    ({"body": ask(response_format={"type": "yaml"})}, 'body.response_format: can only be {"type": "json_schema", '),
    ({"body": ask(response_format={"type": "json_schema"})}, "body.response_format: can only be"),
    ({"body": ask(response_format="json")}, "body.response_format: can only be"),
    (
        {"body": ask(response_format={"type": "json_schema", "json_schema": {"schema": "{}"}})},
        "body.response_format: can only be",
    ),
    ({"body": ask(guided_json="{")}, "body.guided_json: can only be a JSON Schema, an object or the text of one here"),
    ({"body": ask(guided_choice="a")}, "body.guided_choice: can only be a list of texts here"),
    (
        {"body": ask(guided_grammar="root ::= x")},
        "body.guided_grammar: is no field here: what the answer has to",
    ),
    (
        {"body": ask(structured_outputs={"regex": "a", "choice": ["a"]})},
        "body.structured_outputs: can only be an",
    ),
    ({"body": ask(structured_outputs={"grammar": "x"})}, "with one of json, regex, choice and json_object here"),
    ({"body": ask(guided_regex="a", response_schema="b")}, "body.response_schema: says once more what the answer has"),
    ({"body": ask(questions=["?"])}, "body.questions: is no field here"),
    ({"body": ask(stream=True)}, "body.stream: can only be false here"),
    ({"body": ask(frequency_penalty=1)}, "here, or left out: there is repetition_penalty"),
    ({"body": ask(ignore_eos=True)}, "body.ignore_eos: can only be false here, or left out"),
    ({"body": ask(modalities=["text", "audio"])}, 'body.modalities: can only be ["text"] here, or left out'),
    ({"body": ask(audio={"voice": "x"})}, "body.audio: is no field here: leave it out"),
    ({"body": ask(mm_processor_kwargs={"size": 5})}, "body.mm_processor_kwargs: can only be an object with min_pixels"),
    ({"body": ask(chat_template_kwargs={"x": 1})}, "body.chat_template_kwargs: is no field here: the template is"),
    ({"body": ask(reasoning_effort=["low"])}, "body.reasoning_effort: is no field here"),
    ({"body": ask({"type": "input_audio", "input_audio": {"data": ""}})}, "messages.0.content.0: type is none of"),
    ({"body": ask({"type": "file", "file": {"file_id": "f"}})}, "messages.0.content.0: type is none of"),
    (
        {"body": ask({"type": "image_url", "image_url": {"url": "cat.jpg"}})},
        "content.0: is no image_url with a URL",
    ),
    ({"body": ask({"type": "image_url", "image_url": {"url": "http://h/1"}})}, "What is at http: give as https:"),
    ({"body": {"messages": [{"role": "tool", "content": "x"}]}}, "messages.0.role: Input should be 'system'"),
    ({"body": ask(max_tokens="many", top_p=2)}, "2 faults: generation.max_new_tokens: "),
    ({"custom_id": 7}, "custom_id: Input should be text"),
]


@pytest.mark.holds(
    "docs/batches.md#what-can-the-input-be",
    "what it asks beyond this model",
)
def test_what_no_job_can_do_costs_its_line_and_says_which_field(run: Run) -> None:
    lines = [{**line(str(number), ask()), **odd} for number, (odd, _) in enumerate(REFUSED, 1)]
    jobs, answers, errors = run(*lines, '{"custom_id": "cut", "body": {"mess', line("last", ask()), prompt="Default?")
    assert len(jobs) == 1
    assert [each["custom_id"] for each in answers] == ["last"]
    told = {each["response"]["body"]["error"]["message"].partition(":")[0]: each for each in errors}
    for number, (_, sentence) in enumerate([*REFUSED, ({}, "job: is no JSON (")], 1):
        error = told.pop(f"line {number}")
        assert sentence in error["error"]["message"]
        assert error["custom_id"] == (str(number) if number < len(REFUSED) else None)
        assert_readable(error, 400, "INVALID_JOB", "invalid_request_error")
    assert told == {}


def assert_readable(error: dict[str, Any], status: int, code: str, kind: str) -> None:
    """By who looks for an error beside the response, as for vLLM's, and by who looks at the response's status."""
    assert error.keys() == {"id", "custom_id", "response", "error"}
    assert error["error"].keys() == {"code", "message"}
    assert error["error"]["code"] == code
    assert error["response"]["status_code"] == status
    said = ErrorObject.model_validate(error["response"]["body"]["error"], strict=True)
    assert (said.code, said.type, said.message) == (code, kind, error["error"]["message"])


def test_a_job_that_fails_is_an_error_of_who_is_to_blame(run: Run) -> None:
    codes = ErrorCode.MEDIA_CORRUPT, ErrorCode.INVALID_JOB, ErrorCode.OUT_OF_MEMORY
    lines = [line(code, ask(metadata={"code": code})) for code in codes]
    _, answers, errors = run(*lines, reply=lambda job: ErrorCode(job.metadata["code"]))
    assert answers == []
    for code, error in zip(codes, sorted(errors, key=lambda error: codes.index(error["custom_id"])), strict=True):
        is_ours = code is ErrorCode.OUT_OF_MEMORY
        kind = "server_error" if is_ours else "invalid_request_error"
        assert_readable(error, 500 if is_ours else 400, code.value, kind)


def test_lines_of_either_kind_stand_in_one_file(run: Run, tmp_path: Path) -> None:
    jobs, answers, _ = run(
        line("theirs", ask()), {"custom_id": "ours", "prompt": "?"}, {"body": ask(), "custom_id": None}
    )
    assert len(jobs) == 3
    forms = {each["custom_id"]: "response" in each for each in answers}
    assert forms == {"theirs": True, "ours": False, "line-3": True}
    source = JsonLines(str(tmp_path / "in.jsonl"))
    assert [each.is_openai for each in source.lines()] == [True, False, True]
    source.close()
