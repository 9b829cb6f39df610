"""Every field of a job at the ends of what it may be, and beyond: answered, or told of by a code of the caller's."""

import json
from collections.abc import Iterable, Iterator
from typing import Any, get_args

import pytest

from keye.config.codes import ErrorCode, JobState
from keye.config.faults import InvalidJob, JobFailed
from keye.config.job import AnalysisJob, AnyPart, ChatMessage, GenerationOptions, ImagePart, VideoPart
from keye.config.wire import seal
from tests.integration.analyze.plant import Plant, briefly
from tests.support.conditions import eventually
from tests.support.zoo import encode_clip, steady_times

# The smallest float and the largest; one that is none in float32; integers beyond 64 bits and beyond a float.
TINY, HUGE, TOO_SMALL, LONG, LONGER = 5e-324, 1.7976931348623157e308, 1e-300, 2**64, 10**400
FAINT = (TINY, TOO_SMALL, 1e-45, 1e-40, 1e-38, 1e-20, 1e-8)
NAN, INFINITY, HALF = float("nan"), float("inf"), "half \ud83d"
BEYOND_FLOAT = (0, -1, NAN, INFINITY, -INFINITY, LONGER, HALF)
FILL = 2**20

Values = dict[str, tuple[Iterable[Any], Iterable[Any]]]

# By field: what is answered, and what is the caller's to correct.
GENERATION: Values = {
    "max_new_tokens": ((1, 8), (0, -1, 131072, 131073, LONG, LONGER)),
    "temperature": ((0, -0.0, *FAINT, 2), (-1, 2.1, HUGE, NAN, INFINITY, LONGER)),
    "top_p": ((*FAINT, 1 - 1e-16, 1), (*BEYOND_FLOAT, 1.1, HUGE)),
    "top_k": ((0, 1, 415, 416, 417, 2**31, 2**63, LONG, LONGER), (-1, NAN, 0.5)),
    "repetition_penalty": ((*FAINT, 1, 2), (*BEYOND_FLOAT, 2.1, HUGE)),
    "stop": (
        ([], ["\0"], ["\ufdd0"], ["\U0010ffff"], [" "], ["a"] * 8, ["x" * (FILL - 8)]),
        ([""], ["a"] * 9, [HALF], ["x" * FILL], [None]),
    ),
    "seed": ((0, 1, 2**32, 2**63 - 1), (-1, 2**63, LONGER, NAN)),
    "max_thinking_tokens": ((0, 1, 131072), (-1, 131073, LONGER, NAN, 0.5)),
    "min_tokens": ((0, 1, 6), (-1, 7, LONGER, NAN, 0.5)),
    "n": ((1,), (0, 17, LONGER, NAN, 1.5)),
    "logprobs": ((True, False), ("", None, 2)),
}
PIXELS = (784, 785, 2**31, 2**63, LONG, LONGER), (783, 0, -1, NAN)
SIDES = (28, 29), (27, 0, 16385, LONGER)
IMAGE: Values = {
    "digest": ((True, False), ("", None, 2)),
    "min_pixels": (PIXELS[0][:-2], PIXELS[1]),
    "max_pixels": PIXELS,
    "resized_height": SIDES,
    "resized_width": SIDES,
}
VIDEO: Values = IMAGE | {
    "fps": ((*FAINT, 59.999, 60), (*BEYOND_FLOAT, 60.1, HUGE)),
    "content": (("action", "static", "dialogue", "hd"), ("", "HD")),
    "sampling": (("even", "keyframes"), ("", None)),
    "max_frames": ((1, 2, 768, 769, 4096), (0, -1, 4097, LONGER)),
    "start_seconds": ((0, -0.0, *FAINT), (1e9, HUGE, 2.0**63, -1, NAN, INFINITY, LONGER)),
    "end_seconds": ((*FAINT, 1e-6, 1e-3, 1e9, HUGE), BEYOND_FLOAT),
}
TEXT = ("\0", "\ufdd0", "\U0010ffff", "\u202e", "\ufeff", " ", "\r\n" * 999, "<|image_pad|>", "{% raw %}", "/think")
DEEP: Any = []
for _ in range(5000):
    DEEP = [DEEP]
JOB: Values = {
    "media": ((), ([{"type": "image", "uri": ""}] * 65, [DEEP], HALF)),
    "prompt": (TEXT, ("", HALF, "x" * FILL, "x" * (FILL + 1))),
    "messages": ((), ([], [{"role": "user", "content": HALF}], [{"role": "assistant", "content": "a"}])),
    "thinking": (("auto", "think", "no_think"), ("", HALF)),
    "generation": ((), ({"temprature": 1}, DEEP)),
    "priority": (("high", "normal", "low"), ("", 0, HALF)),
    "deadline_seconds": ((7 * 86400, 600), (*BEYOND_FLOAT, *FAINT, 7 * 86400 + 1, HUGE)),
    "max_attempts": ((1, 10), (0, 11, LONGER, NAN)),
    "idempotency_key": (("\0", " ", "\n", "\U0010ffff" * 256), ("", "x" * 257, HALF)),
    "metadata": (
        ({"": ""}, {"\0": "\0"}, {"a": HUGE}, {"a": TINY}, {"a": LONGER}, {"a": "x" * 16000}),
        ({"a": NAN}, {"a": INFINITY}, {"a": DEEP}, {"a": HALF}, {HALF: 1}, {"a": 10**4500}, {"a": "x" * 2**14}),
    ),
    "traceparent": ((f"00-{'0' * 32}-{'0' * 16}-00",), ("", "00", HALF)),
    "result_ttl_seconds": ((600, 3650 * 86400), (59, 0, LONG, LONGER)),
    "response_schema": ((), ()),
    "questions": ((), (["?"], [{"prompt": "?"}] * 65, [DEEP], HALF, [HALF], "?")),
}
CHATS: list[Any] = [
    [{"role": "user", "content": []}],
    [{"role": "user", "content": ""}],
    [{"role": "assistant", "content": ""}, {"role": "user", "content": [{"type": "text", "text": "\0"}]}],
    [{"role": "user", "content": "a"}, {"role": "system", "content": ""}, {"role": "user", "content": [""]}],
    [{"role": "user", "content": "a"}] * 999,
]
# Behind `file://`, `https://` and `s3://`: no URL, or one whose host is none.
HOSTS = ["[/x", "[", "[::1", "[x]/x", "[v1.x]/x", "[::1%25eth0]/x", "[fe80::1%lo]/x", "[::ffff:127.0.0.1]:1/x"]
HOSTS += ["\u2100/x", "\uff1a/x", "a\u2100b.com/x", "a\u3002\u3002b/x", "xn--\u00e9/x", "\u200d/x", "\ud7ff/x"]
HOSTS += ["a..b/x", ".../x", ".a/x", "x" * 64 + "/x", ("x" * 60 + ".") * 20 + "/x", "%/x", "a\\b/x", "a b/x"]
HOSTS += ["h.invalid:port/x", "h.invalid:99999/x", "h.invalid:-1/x", "h.invalid:\u0663/x", "h.invalid:1e9/x", ":/x"]
HOSTS += ["", "?", "#", "@/x", "a@h.invalid/x", "h\0st/x", "\r\nh.invalid/x", "127.1/x", "0x7f.1/x", "1" * 4000]
PATHS = ["h.invalid/\0", "h.invalid/%00", "h.invalid/%zz", "h.invalid/a\r\nb: c", "h.invalid/" + "../" * 900]
ADDRESSES = [scheme + rest for scheme in ("file://", "FILE://", "https://", "s3://") for rest in HOSTS + PATHS]
ADDRESSES += [scheme + rest for scheme in ("data:", "file:", "s3:", "https:") for rest in ("", "[", "\0", ",%", "//[")]
ADDRESSES += ["data:;base64,\u00e9", "data:;base64,A", "data:image/png;base64,AAAA", "data:," + "%" * 999, HALF]
ADDRESSES += [f"/{HALF}", f"https://{HALF}", "/" + "x" * 4095, "/" + "x/" * 2000, "//", "/..", "/\0", "/%00"]

# What no job is to blame for.
NOT_THE_CALLERS = {ErrorCode.INTERNAL, ErrorCode.WORKER_LOST, ErrorCode.OUT_OF_MEMORY}


def ends(plant: Plant, asked: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[tuple[str, str]]:
    """How each job ended: "answered", or its code."""
    jobs = []
    for name, fields in asked:
        try:
            jobs.append((name, plant.client.submit({"prompt": "what?", "generation": briefly()} | fields)))
        except InvalidJob:
            yield name, ErrorCode.INVALID_JOB
    for name, job in jobs:
        try:
            job.result(timeout=120)
            yield name, "answered"
        except JobFailed as failed:
            yield name, failed.failure.code


def check(plant: Plant, values: Values, make: Any) -> None:
    """`make` a job of a field and its value."""
    asked = {
        f"{field} #{number}{'' if is_answered else ' beyond'}": (make(field, value), is_answered)
        for field, both in values.items()
        for is_answered, some in zip((True, False), both, strict=True)
        for number, value in enumerate(some)
    }
    odd = [
        (name, end)
        for name, end in ends(plant, ((name, fields) for name, (fields, _) in asked.items()))
        if (end == "answered") != asked[name][1] or end in NOT_THE_CALLERS
    ]
    assert odd == []


def test_every_field_is_tried() -> None:
    assert GENERATION.keys() == GenerationOptions.model_fields.keys()
    assert JOB.keys() == AnalysisJob.model_fields.keys()
    assert IMAGE.keys() == ImagePart.model_fields.keys() - {"uri", "type"}
    assert VIDEO.keys() == VideoPart.model_fields.keys() - {"uri", "type"}
    assert ChatMessage.model_fields.keys() == {"role", "content"}
    assert len(get_args(get_args(AnyPart)[0])) == 3


@pytest.mark.parametrize("others", [{}, {"temperature": 0.6}, {"temperature": TOO_SMALL, "repetition_penalty": 2}])
def test_extreme_sampling_is_answered(plant: Plant, others: dict[str, Any]) -> None:
    check(plant, GENERATION, lambda field, value: {"generation": briefly(**others | {field: value})})


def test_a_temperature_too_small_to_divide_by_is_greedy(plant: Plant) -> None:
    def text(**options: Any) -> str:
        return plant.client.submit(prompt="what?", generation=briefly(**options)).result(timeout=60).raw_text

    assert text(temperature=TINY, seed=1) == text(temperature=1e-7) == text(temperature=0)
    assert text(repetition_penalty=TINY) == text(repetition_penalty=1e-7)


def test_extreme_images_are_answered(plant: Plant, picture: str) -> None:
    def make(field: str, value: Any) -> dict[str, Any]:
        other = {"resized_height": "resized_width", "resized_width": "resized_height"}.get(field)
        return {"media": [{"type": "image", "uri": picture, field: value} | ({other: 28} if other else {})]}

    check(plant, IMAGE, make)


@pytest.mark.parametrize("num_frames", [1, 8])
@pytest.mark.parametrize("others", [{}, {"sampling": "keyframes", "end_seconds": TINY}, {"start_seconds": TOO_SMALL}])
def test_extreme_videos_are_answered(plant: Plant, num_frames: int, others: dict[str, Any]) -> None:
    clip = str(encode_clip(plant.media / f"{num_frames}.mp4", steady_times(num_frames)))

    def make(field: str, value: Any) -> dict[str, Any]:
        other = {"resized_height": "resized_width", "resized_width": "resized_height"}.get(field)
        rest = (
            {"end_seconds": 1e9} if field == "start_seconds" else {"start_seconds": 0} if field == "end_seconds" else {}
        )
        return {
            "media": [{"type": "video", "uri": clip} | others | rest | {field: value} | ({other: 28} if other else {})]
        }

    check(plant, VIDEO, make)


def test_extreme_jobs_are_answered(plant: Plant) -> None:
    check(plant, JOB, lambda field, value: {field: value})


def test_extreme_chats_are_answered(plant: Plant) -> None:
    asked = [
        (f"{number} {thinking}", {"prompt": None, "messages": chat, "thinking": thinking})
        for number, chat in enumerate(CHATS)
        for thinking in ("auto", "think")
    ]
    assert {end for _, end in ends(plant, asked)} == {"answered"}


@pytest.mark.parametrize("kind", ["image", "video"])
def test_an_address_that_leads_nowhere_is_the_callers_to_correct(plant: Plant, kind: str) -> None:
    asked = [(repr(uri[:60]), {"media": [{"type": kind, "uri": uri}]}) for uri in ADDRESSES]
    ended = list(ends(plant, asked))
    assert [(name, end) for name, end in ended if end == "answered" or end in NOT_THE_CALLERS] == []


@pytest.mark.parametrize("submitted_at", [0, TINY, -1e9, 1e18, HUGE, -HUGE, INFINITY, NAN, LONGER])
@pytest.mark.parametrize("deadline", [{}, {"deadline_seconds": 600}])
def test_a_job_that_was_sealed_at_an_odd_time_ends(plant: Plant, submitted_at: float, deadline: dict[str, int]) -> None:
    sealed = seal(AnalysisJob.model_validate({"prompt": "what?", "generation": briefly(), **deadline}))
    payload = json.loads(sealed.model_dump_json()) | {"submitted_at": submitted_at}
    plant.send(payload, sealed.job_id)
    eventually(lambda: JobState(plant.record(sealed.job_id).get("state", JobState.QUEUED)).is_final)
    outcome = json.loads(plant.record(sealed.job_id)["outcome"])
    assert outcome.get("code") not in NOT_THE_CALLERS
