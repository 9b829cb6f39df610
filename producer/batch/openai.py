"""The lines of OpenAI's batches: what one asks, as the fields of a job, and what is said of how it ended."""

import json
from collections.abc import Mapping
from typing import Any

from keye.config.contract import MAX_PLACE_CHARS, escaped, list_faults, name_kind
from keye.config.familiar_names import OF_A_JOB
from keye.config.faults import InvalidJob
from keye.config.job import AnalysisJob, GenerationOptions, Thinking
from keye.config.outcome import Answer, JobResult, TokenLogprob
from keye.producer.batch.lines import read_fields

# Servers differ in what is before it.
_ENDPOINT = "chat/completions"

_OF_A_LINE = {"custom_id", "method", "url", "body"}
# How they are called there, and what says nothing about the answer.
_OF_GENERATION = {name: name for name in GenerationOptions.model_fields}
_OF_GENERATION |= {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens"}
_OF_A_JOB = AnalysisJob.model_fields.keys() - {"media", "prompt", "messages", "generation", "questions"}
_SAYS_NOTHING = {"model", "user", "store", "service_tier", "safety_identifier", "prompt_cache_key", "cache_salt"}
_SAYS_NOTHING |= {"prompt_cache_options", "prompt_cache_retention", "parallel_tool_calls", "stream_options"}
_SAYS_NOTHING |= {"guided_decoding_backend"}
# What may be said because it is so.
_AS_IT_IS: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "stream": (False,),
    "top_logprobs": (0,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "verbosity": ("medium",),
}
# The same of vLLM's.
_AS_IT_IS |= {
    "priority": (0,),
    "min_p": (0,),
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "ignore_eos": (False,),
    "stop_token_ids": ([],),
    "skip_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "add_special_tokens": (False,),
    "echo": (False,),
}
# Each says what the answer has to fit: by OpenAI, by vLLM today and before, by us; and what else it cannot be.
_OF_A_SCHEMA = {
    "response_format": '{"type": "json_schema", "json_schema": {"schema": ...}}, {"type": "json_object"} or '
    '{"type": "text"}',
    "structured_outputs": "an object with one of json, regex, choice and json_object",
    "guided_json": "a JSON Schema, an object or the text of one",
    "guided_regex": "a regular expression, as text",
    "guided_choice": "a list of texts",
    "response_schema": "",
}
_ANY_OBJECT = {"type": "object"}
_THINKING = {"none": Thinking.NO_THINK, "minimal": Thinking.NO_THINK}
_THINKING |= dict.fromkeys(("low", "medium", "high", "xhigh"), Thinking.THINK)
# What vLLM's `mm_processor_kwargs` may say of each medium; of a picture, but for the last.
_OF_A_PROCESSOR = ("min_pixels", "max_pixels", "fps")
# What of a message, and of a part of one, the model is not shown.
_OF_NO_MESSAGE = {"name", "reasoning", "reasoning_content"}
_OF_NO_PART = {"prompt_cache_breakpoint", "uuid"}


def read_request(line: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the job that it asks for. Raises `InvalidJob` with every fault that is not the job's own."""
    faults = [f"{_shown(name)}: is no field of a batch's line" for name in sorted(line.keys() - _OF_A_LINE)]
    if line.get("method", "POST") != "POST":
        faults.append("method: is not POST")
    fields: dict[str, Any] = {"generation": {}}
    body, url = line["body"], line.get("url", _ENDPOINT)
    if not isinstance(url, str) or not url.partition("?")[0].rstrip("/").endswith(_ENDPOINT):
        # Its body is another's, too.
        faults.append(f"url: is not /v1/{_ENDPOINT}, which alone is answered here")
    elif not isinstance(body, Mapping):
        faults.append(f"body: Input should be an object, not {name_kind(body)}")
    else:
        # That is an argument of the clients in programs, which put what it holds into the body.
        extra = body.get("extra_body")
        body = {**body, **extra, "extra_body": None} if isinstance(extra, Mapping) else body
        faults += [f"body.{_shown(name)}: {fault}" for name in body if (fault := _take(fields, name, body))]
        if "messages" not in fields:
            faults.append("body.messages: Field required")
    if faults:
        raise InvalidJob(list_faults(faults))
    return fields


def _take(fields: dict[str, Any], name: str, body: Mapping[str, Any]) -> str | None:
    """Returns what is wrong with it."""
    value = body[name]
    if value is None or name in _SAYS_NOTHING or value in _AS_IT_IS.get(name, ()):
        return None
    if name == "messages":
        fields[name] = _messages(value, body.get("mm_processor_kwargs"))
    elif name in _OF_GENERATION:
        if name == "stop" and isinstance(value, str):
            value = [value]
        elif name == "top_k" and value == -1:
            value = 0  # of vLLM: all
        fields["generation"][_OF_GENERATION[name]] = value
    elif name in _OF_A_SCHEMA:
        try:
            schema = _schema(name, value)
        except ValueError:
            return f"can only be {_OF_A_SCHEMA[name]} here, or left out"
        if schema is not None and fields.setdefault("response_schema", schema) is not schema:
            return "says once more what the answer has to fit: say it once"
    elif name in _OF_A_JOB:
        fields[name] = value
    elif name == "reasoning_effort" and isinstance(value, str) and value in _THINKING:
        fields["thinking"] = _THINKING[value]
    elif name == "chat_template_kwargs" and value in ({"enable_thinking": True}, {"enable_thinking": False}):
        fields["thinking"] = Thinking.THINK if value["enable_thinking"] else Thinking.NO_THINK
    elif name == "mm_processor_kwargs":
        if not isinstance(value, Mapping) or not value.keys() <= set(_OF_A_PROCESSOR):
            return f"can only be an object with {', '.join(_OF_A_PROCESSOR)} here"
    elif name in _AS_IT_IS:
        fault = f"can only be {' or '.join(map(json.dumps, _AS_IT_IS[name]))} here, or left out"
        return f"{fault}: {OF_A_JOB[name]}" if name in OF_A_JOB else fault
    else:
        return f"is no field here: {OF_A_JOB.get(name, 'leave it out')}"
    return None


def _schema(name: str, value: Any) -> Any:
    """The `response_schema` that it says, None where any text will do. Raises `ValueError` where it says none."""
    match name, value:
        case "response_format", {"type": "text"}:
            return None
        case "response_format", {"type": "json_schema", "json_schema": {"schema": dict() as schema}}:
            return schema
        case "response_format", {"type": "json_object"}:
            return _ANY_OBJECT
        case "response_format", {"type": "json_schema", "json_schema": dict() as named} if named.get("schema") is None:
            return _ANY_OBJECT
        case "structured_outputs", dict():
            said = [(f"guided_{kind}", each) for kind, each in value.items() if each not in (None, False)]
            if len(said) == 1:
                return _schema(*said[0])
        case "guided_json", str():
            return _schema(name, read_fields(value.encode()))
        case ("guided_json", dict()) | ("guided_regex", str()) | ("guided_choice", list()) | ("response_schema", _):
            return value
        case "guided_json_object", True:
            return _ANY_OBJECT
    raise ValueError(name)


def _messages(given: Any, processor: Any) -> Any:
    """Those of a job; what is none is left for it to refuse."""
    return [_message(each, processor) for each in given] if isinstance(given, list) else given


def _message(message: Any, processor: Any) -> Any:
    if not isinstance(message, Mapping):
        return message
    # Who answered before says what he did not: no tools, no refusal.
    said = {name: value for name, value in message.items() if value not in (None, []) and name not in _OF_NO_MESSAGE}
    if said.get("role") == "developer":
        said["role"] = "system"
    if isinstance(content := said.get("content"), list):
        said["content"] = [_part(each, processor) for each in content]
    return said


def _part(part: Any, processor: Any) -> Any:
    if not isinstance(part, Mapping):
        return part
    said = {name: value for name, value in part.items() if name not in _OF_NO_PART}
    kind = str(said.get("type")).removeprefix("input_").removesuffix("_url")
    if isinstance(processor, Mapping) and kind in ("image", "video"):
        names = _OF_A_PROCESSOR if kind == "video" else _OF_A_PROCESSOR[:-1]
        said = {name: processor[name] for name in names if name in processor} | said
    return said


def _shown(name: str) -> str:
    return escaped(name)[:MAX_PLACE_CHARS]


def answered(custom_id: str, result: JobResult, ended_at: float) -> dict[str, Any]:
    """The line of the output for one that was answered; its body is a `chat.completion`.

    Of `n` answers those that could not be given are no choices: the others' `index` tells.
    """
    usage = result.usage
    answers = [answer for answer in result.answers if isinstance(answer, Answer)]
    body = {
        "id": f"chatcmpl-{result.job_id}",
        "object": "chat.completion",
        "created": int(ended_at),
        "model": result.model.name,
        "choices": [_choice(answer.sample, answer) for answer in answers] or [_choice(0, result)],
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        },
    }
    return _line(custom_id, result.job_id, 200, body, None)


def _choice(index: int, answer: Answer | JobResult) -> dict[str, Any]:
    message = {"role": "assistant", "content": answer.answer, "refusal": None}
    if answer.reasoning is not None:
        message["reasoning_content"] = answer.reasoning
    logprobs = None
    if answer.logprobs is not None:
        logprobs = {"content": list(map(_logprob, answer.logprobs)), "refusal": None}
    finish_reason = "length" if answer.finish_reason == "length" else "stop"
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish_reason}


def _logprob(each: TokenLogprob) -> dict[str, Any]:
    # Of half a character it is not told which half.
    in_bytes = None if "\ufffd" in each.token else list(each.token.encode())
    return {"token": each.token, "bytes": in_bytes, "logprob": each.logprob, "top_logprobs": []}


def unanswered(custom_id: str | None, job_id: str, code: str, message: str, is_callers: bool) -> dict[str, Any]:
    """The line of the errors for one that was not; `is_callers` fault it is, or nobody's who asks."""
    kind = "invalid_request_error" if is_callers else "server_error"
    error = {"message": message, "type": kind, "param": None, "code": code}
    return _line(custom_id, job_id, 400 if is_callers else 500, {"error": error}, {"code": code, "message": message})


def _line(
    custom_id: str | None, job_id: str, status: int, body: dict[str, Any], error: dict[str, str] | None
) -> dict[str, Any]:
    response = {"status_code": status, "request_id": job_id, "body": body}
    return {"id": f"batch_req_{job_id}", "custom_id": custom_id, "response": response, "error": error}
