"""No text of a caller, and none that he has a model write, costs more than its length: four times as long is at most
four times as dear, and never sixteen.
"""

import json
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress

import pytest

from keye.config.contract import escaped
from keye.config.faults import Fault, KeyeError
from keye.config.job import AnalysisJob, ImagePart, Priority
from keye.config.settings import Settings
from keye.config.terminal import visible
from keye.config.topology import message
from keye.config.wire import fingerprint_of, open_sealed, seal
from keye.producer import medium
from keye.producer.least_tokens import least_tokens
from keye.worker.broker.admission import read_message
from keye.worker.demo.local_worker import SMALL_KEYE
from keye.worker.engine.detokenizer import StopStrings
from keye.worker.media.faults import MediumFault, name_medium
from keye.worker.media.fetch.local import open_inline
from keye.worker.model.prompt import PromptFormat
from keye.worker.results.thinking import ThinkingSplitter
from keye.worker.telemetry.redaction import redaction

# Between four times and sixteen times; what takes less than this is cheap, whatever the clock says of it.
MOST_TIMES, CHEAP_SECONDS = 9, 0.02


def cost(call: Callable[[str], object], text: str) -> float:
    """Seconds of a processor, with what it refuses."""
    began = time.process_time()
    with suppress(MediumFault, Fault, KeyeError, ValueError):
        call(text)
    return time.process_time() - began


def assert_no_dearer_than_long(call: Callable[[str], object], unit: str, num_chars: int) -> None:
    short, long = (unit * (times * num_chars // len(unit)) for times in (1, 4))
    for _ in range(4):
        before, after = cost(call, short), cost(call, long)
        if after < CHEAP_SECONDS or after < MOST_TIMES * before:
            return
    pytest.fail(f"{unit!r}: {before:.3f} s, and {after:.3f} s where it is four times as long")


def submit_and_open(prompt: str) -> None:
    job = AnalysisJob(prompt=prompt)
    sealed = seal(job)
    fingerprint_of(job)
    least_tokens(job)
    open_sealed(json.loads(sealed.model_dump_json()))
    assert sealed.record


def admit(prompt: str) -> None:
    sealed = seal(AnalysisJob(prompt=prompt))
    read_message(message(sealed.job_id, sealed.model_dump_json(), Priority.NORMAL).encode(), ())


def look_at(given: str) -> None:
    with ExitStack() as opened:
        medium.look_at(given, opened)


TEXTS = ["a", " ", "\n", "\t \r", "1", "'s", "<", "\\", '"', "\0", "%41", "%", "{{", "\u00a0", "\ufdd0", "<|im_end|>"]
TEXTS += ["\u0301", "a\u0316\u0301", "👩\u200d🔬", "한", "\u1112\u1161\u11ab", "ﷺ", "\U000e0061", "</think>", "<think"]
URIS = ["a", "/", "@", "a@", "?", "#", ";base64", ";base64,", ",", "%", "%41", "\\", "é", ":", "//"]
SECRETS = [
    "a://",
    "://a",
    "a://a:",
    "a://a@",
    ":",
    "@",
    "?a=",
    "?",
    "token=",
    "password\\",
    "secretkey ",
    "secret_key\\",
]
SECRETS += [
    "authorization:",
    "<secretkey>",
    "<a",
    "AKIA",
    "p%ss",
    "p\\",
    "\\\\",
    "%5C",
    'token="\\',
    "b'\\",
    "%3D",
    "x-amz-",
]


@pytest.mark.parametrize("unit", TEXTS)
def test_prompt_on_its_way(unit: str) -> None:
    assert_no_dearer_than_long(submit_and_open, unit, 2**15)
    assert_no_dearer_than_long(admit, unit, 2**15)


@pytest.fixture(scope="module")
def prompt_format() -> PromptFormat:
    return PromptFormat.from_checkpoint(SMALL_KEYE)


@pytest.mark.parametrize("unit", TEXTS)
def test_prompt_for_the_model(prompt_format: PromptFormat, unit: str) -> None:
    def encode(text: str) -> None:
        prompt_format.encode(prompt_format.render([{"role": "user", "content": [{"type": "text", "text": text}]}]))

    assert_no_dearer_than_long(encode, unit, 2**15)


def test_prompt_in_many_parts(prompt_format: PromptFormat) -> None:
    def render(text: str) -> None:
        parts = [{"type": "text", "text": letter * 30} for letter in text]
        prompt_format.render([{"role": "user", "content": parts}])

    assert_no_dearer_than_long(render, "a", 8000)


@pytest.mark.parametrize("unit", URIS)
@pytest.mark.parametrize("beginning", ["data:", "data:;base64,", "data:,", "https://", "https:", "s3://", "/", "file:"])
def test_reference_to_a_medium(beginning: str, unit: str) -> None:
    for call in (name_medium, look_at, lambda uri: ImagePart(uri=uri)):
        assert_no_dearer_than_long(lambda rest, call=call: call(beginning + rest), unit, 2**18)
    if beginning.startswith("data:"):
        assert_no_dearer_than_long(lambda rest: open_inline(beginning + rest, 2**30).close(), unit, 2**18)


@pytest.mark.parametrize("unit", TEXTS)
def test_what_is_told_of_a_text(unit: str) -> None:
    for call in (
        escaped,
        visible,
        lambda name: AnalysisJob(**{name: 1}),
        lambda text: AnalysisJob(prompt="?", metadata={text: text}),
        lambda text: AnalysisJob(prompt="?", traceparent=text),
    ):
        assert_no_dearer_than_long(call, unit, 2**17)


@pytest.mark.parametrize("unit", SECRETS)
def test_what_is_kept_out_of_the_log(unit: str) -> None:
    redact = redaction(Settings(redis_url="redis://user:p%25ss%5C%5Cword@host:6379/0"))
    assert_no_dearer_than_long(redact, unit, 2**15)


@pytest.mark.parametrize("stop", [" " * 2**20, " " * 2**19 + "x", "a " * 2**19])
def test_answer_that_begins_like_a_stop_string(stop: str) -> None:
    def answer(text: str) -> None:
        stop_strings = StopStrings([stop])
        for start in range(0, len(text), 64):
            stop_strings.push(text[start : start + 64])
        stop_strings.push("y")

    assert_no_dearer_than_long(answer, stop[:2], 2**16)


def test_answer_of_white_space_without_an_end() -> None:
    def answer(text: str) -> None:
        splitter = ThinkingSplitter()
        for piece in ("x", *text):
            splitter.push(piece * 4)

    assert_no_dearer_than_long(answer, " ", 8000)
