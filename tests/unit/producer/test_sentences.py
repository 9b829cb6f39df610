"""What becomes of odd input at every door of a producer: it is understood, or refused in words that a caller knows."""

import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from keye.config.wire import seal
from keye.producer import AnalysisJob, ChatMessage, GenerationOptions, ImagePart, InvalidJob, TextPart, VideoPart
from keye.producer.cli import app
from keye.producer.client import Client, build_job
from keye.producer.fields import JobFields
from keye.producer.shell import ExitCode

# No Redis is there: a job that gets as far has found nothing to say.
CLIENT = Client("redis://127.0.0.1:9/0")
INSIDES = re.compile(
    r"pydantic|\[type=|input_value|function-|tagged-union|discriminator|Value error|validation error|valid tuple|Tuple "
    r"|instance of|object to extract|validator|unicode string|after validation|For further|0x[0-9a-f]{6}|<class|keye\."
    r"|Part\]|\bstr:|\[key\]"
)
HALF = "half \ud83d"
PNG = b"\x89PNG\r\n\x1a\n"
CAT = ImagePart(uri="/cat.png")
QWENS = {"type": "image", "image": "file:///cat.png"}


def photo() -> io.BytesIO:
    file = io.BytesIO()
    Image.new("RGB", (30, 20)).save(file, "PNG")
    return file  # where it was written to the end


UNDERSTOOD: dict[str, tuple[Any, list[str]]] = {
    "text": ("/cat.png", ["/cat.png"]),
    "path": (Path("/cat.png"), ["/cat.png"]),
    "paths in a set": ({Path("/cat.png")}, ["/cat.png"]),
    "part": (CAT, ["/cat.png"]),
    "part as a dict": ({"type": "image", "uri": "/cat.png"}, ["/cat.png"]),
    "path in a part": ({"type": "image", "uri": Path("/cat.png")}, ["/cat.png"]),
    "part that says no type": ({"uri": "/cat.png"}, ["/cat.png"]),
    "generator": ((uri for uri in ("/a.png", "/b.mp4")), ["/a.png", "/b.mp4"]),
    "nothing": (None, []),
    "bytes": (PNG, ["data:image/png;base64,"]),
    "bytearray": (bytearray(PNG), ["data:image/png;base64,"]),
    "memoryview": ([memoryview(PNG)], ["data:image/png;base64,"]),
    "file": (io.BytesIO(PNG), ["data:image/png;base64,"]),
    "file that was just written": ([photo()], ["data:image/png;base64,"]),
    "picture": (Image.new("RGB", (30, 20)), ["data:image/png;base64,"]),
    "array": (np.zeros((20, 30, 3), np.uint8), ["data:image/png;base64,"]),
    "tensor": ([torch.zeros(20, 30, 4, dtype=torch.uint8)], ["data:image/png;base64,"]),
    "bytes in a part": ({"type": "image", "uri": PNG}, ["data:image/png;base64,"]),
    "OpenAI's": ({"type": "image_url", "image_url": {"url": "https://host/cat"}}, ["https://host/cat"]),
    "Qwen's": (QWENS, ["file:///cat.png"]),
}


@pytest.mark.parametrize("media", UNDERSTOOD)
def test_media_whose_meaning_is_plain_are_understood(media: str) -> None:
    given, uris = UNDERSTOOD[media]
    job = build_job({"prompt": "?", "media": given})
    assert [part.uri[: len(uri)] for part, uri in zip(job.media, uris, strict=True)] == uris


def test_file_of_the_disk_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(photo().getvalue())
    with (tmp_path / "cat.png").open("rb") as file:
        file.read(5)
        assert build_job({"prompt": "?", "media": file}) == build_job({"prompt": "?", "media": photo()})


@pytest.mark.parametrize("messages", [{"role": "user", "content": "?"}, ChatMessage(role="user", content="?")])
def test_one_message_needs_no_list(messages: Any) -> None:
    assert build_job({"messages": messages}).messages == (ChatMessage(role="user", content="?"),)


class Upload:
    """As web frameworks have them."""

    async def read(self) -> bytes:
        return PNG


def closed() -> io.BytesIO:
    file = photo()
    file.close()
    return file


REFUSED_MEDIA: dict[str, tuple[Any, str]] = {
    "batch": (np.zeros((2, 4, 4, 3), np.uint8), r"array of shape \(2, 4, 4, 3\) and type uint8\. Give uint8"),
    "tensor": ([torch.zeros(3, 4, 4)], r"array of shape \(3, 4, 4\) and type float32\. Give uint8"),
    "file of text": (io.StringIO("text"), "gives no bytes. Open it with 'rb'"),
    "closed file": (closed(), "file that cannot be read .*closed"),
    "asynchronous file": (Upload(), r"give its `\.file`, where it has one, or what `await file\.read\(\)` returns"),
    "broken picture": (Image.new("RGB", (0, 0)), "PIL image that cannot be read"),
    "nothing": ([None], "is nothing .*Give a path or URI"),
    "number": ([7], "is a number. Give a path or URI"),
    "list in a list": ([["/a.png"]], "is a list. Give a path or URI"),
    "OpenAI's sound": (
        [{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}],
        """type is none of 'image', 'video'. A part is written {"type": "image", "uri": """,
    ),
    "Qwen's beside ours": ([{**QWENS, "uri": "/cat.png"}], r"image\.image: is no field here: did you mean uri\?"),
    "untyped": ([{"url": "/cat.png"}], "says no type. A part is written"),
    "text part": ([TextPart(text="?")], "type is none of 'image', 'video'"),
    "path that UTF-8 does not hold": ([Path("/cat\udcff.png")], r"image\.uri: .* half a character"),
    "address that is none": ("file://[x", "Give an ImagePart or a VideoPart"),
    "half a character in a data URI": (f"data:image/png;base64,{HALF}", r"image\.uri: .* half a character"),
    "NUL in a path": ("/a\0b", "Give an ImagePart or a VideoPart"),
    "dict": ({"cat": "/cat.png"}, "says no type"),
}


@pytest.mark.parametrize("media", REFUSED_MEDIA)
def test_other_media_are_refused_with_the_way_out(media: str) -> None:
    given, sentence = REFUSED_MEDIA[media]
    with pytest.raises(InvalidJob, match=rf"media\.0.*{sentence}"):
        CLIENT.submit(prompt="?", media=given)


BROKEN: dict[str, dict[str, Any]] = {
    "no field": {},
    "misspelt": {"promt": "?"},
    "bare text as chat": {"messages": "What is it?"},
    "empty chat": {"messages": []},
    "number as message": {"messages": [7]},
    "content is a number": {"messages": [{"role": "user", "content": 7}]},
    "content is a part": {"messages": [{"role": "user", "content": {"type": "text", "text": "?"}}]},
    "content is bare": {"messages": [{"role": "user", "content": ["?", 7, None, PNG]}]},
    "content is OpenAI's": {
        "messages": [
            {"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]}
        ]
    },
    "content is Qwen's beside ours": {"messages": [{"role": "user", "content": [{**QWENS, "uri": "/cat.png"}]}]},
    "no content": {"messages": [{"role": "robot"}]},
    "sizes that disagree": {"prompt": "?", "media": [{"type": "image", "uri": "/a", "resized_height": 99}]},
    "rates that disagree": {"prompt": "?", "media": [{"type": "video", "uri": "/a", "fps": 1, "content": "hd"}]},
    "options of a number": {"prompt": "?", "generation": 7},
    "odd options": {"prompt": "?", "generation": {"stop": "x", "seed": 1.5, "top_k": "x", "temperature": "hot"}},
    "stop": {"prompt": "?", "generation": {"stop": [7, "", HALF]}},
    "words": {"prompt": "?", "thinking": "hard", "priority": 7, "deadline_seconds": "soon", "max_attempts": "often"},
    "metadata": {"prompt": "?", "metadata": [1]},
    "metadata of odd keys": {"prompt": "?", "metadata": {1: 2, (3,): 4}},
    "metadata of odd values": {"prompt": "?", "metadata": {"a": {"b": [object(), np.float32(1), {1, 2}]}}},
    "bytes as text": {"prompt": b"\xff", "idempotency_key": b"\xff"},
    "half in a prompt": {"prompt": HALF},
    "half in a chat": {"messages": [{"role": "user", "content": HALF}]},
    "half in a part": {"messages": [{"role": "user", "content": [{"type": "text", "text": HALF}]}]},
    "half in a URI": {"prompt": "?", "media": [{"type": "image", "uri": f"/{HALF}"}]},
    "half in a key": {"prompt": "?", "idempotency_key": HALF},
    "half in metadata": {"prompt": "?", "metadata": {"a": [{"b": HALF}]}},
    "half in metadata's keys": {"prompt": "?", "metadata": {HALF: 1}},
    "half in a type": {"prompt": "?", "media": [{"type": HALF, "uri": "/a"}]},
    "half in a name": {"prompt": "?", "media": [{"type": "image", "uri": "/a", HALF: 1}], "metadata": {HALF: HALF}},
}


def assert_readable(sentence: str) -> None:
    sentence.encode()
    assert re.match(r"\d+ faults?", sentence)
    assert not INSIDES.search(sentence), sentence


@pytest.mark.parametrize("fields", BROKEN)
@pytest.mark.parametrize("door", [lambda fields: CLIENT.submit(**fields), lambda fields: seal(AnalysisJob(**fields))])
def test_faults_are_told_without_the_words_of_a_library(door: Callable[[dict[str, Any]], Any], fields: str) -> None:
    with pytest.raises(InvalidJob) as refused:
        door(BROKEN[fields])
    assert_readable(str(refused.value))


def can_be_typed(fields: dict[str, Any]) -> bool:
    try:
        return bool(json.dumps(fields))
    except TypeError:
        return False


@pytest.mark.parametrize("fields", [name for name, fields in BROKEN.items() if can_be_typed(fields)])
def test_the_shell_tells_them_too(fields: str) -> None:
    text, env = json.dumps(BROKEN[fields]), {"KEYE_REDIS_URL": "redis://127.0.0.1:9/0"}
    answer = CliRunner().invoke(app, ["submit", "--job", "-"], input=text, env=env)
    assert answer.exit_code == ExitCode.INVALID
    assert_readable(answer.stderr)


@pytest.mark.parametrize("text", [b"", b"\xff", b"[" * 10**5, b"7", b"{"])
def test_what_is_no_job_at_all_is_told_in_a_line(text: bytes) -> None:
    answer = CliRunner().invoke(app, ["submit", "--job", "-"], input=text)
    assert answer.exit_code == ExitCode.INVALID
    assert re.fullmatch(r"1 fault: job: is no JSON( object)?( \(.*\))?\n", answer.stderr)


WORDS = st.sampled_from(["/a.png", "user", "text", "image", "video", "high", HALF, "", "x"]) | st.text(max_size=3)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | WORDS | st.binary(max_size=3) | st.just(CAT)
NAMES = st.sampled_from(
    [*JobFields.__annotations__, "type", "uri", "text", "role", "content", "fps", "stop", "seed", "image", HALF]
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4) | st.sets(st.integers()),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(NAMES, VALUES, max_size=5))
def test_whatever_is_given_is_a_job_or_is_refused_readably(fields: dict[str, Any]) -> None:
    for build in (build_job, lambda fields: AnalysisJob(**fields)):
        try:
            seal(build(fields)).model_dump_json().encode()
        except InvalidJob as refused:
            assert_readable(str(refused))


def test_every_fault_is_told_also_beside_media_that_tell_nothing() -> None:
    fields = {"promt": "?", "media": ["/clip", 7, "relative.png"], "priority": "urgent"}
    with pytest.raises(InvalidJob) as refused:
        CLIENT.submit(**fields)
    message = str(refused.value)
    assert message.startswith("5 faults: ")
    assert all(place in message for place in ("media.0: ", "media.1: ", "media.2: ", "promt: ", "priority: "))
    assert "did you mean prompt?" in message


@pytest.mark.parametrize("make", [lambda: ImagePart(uri="cat"), lambda: VideoPart(uri="/a", fps=0, max_frames=0)])
def test_parts_made_by_hand_are_refused_alike(make: Callable[[], object]) -> None:
    with pytest.raises(InvalidJob) as refused:
        make()
    assert_readable(str(refused.value))


def test_copy_that_was_changed_is_checked_as_it_is_sealed() -> None:
    job = AnalysisJob(prompt="?")
    assert seal(job.model_copy(update={"priority": "high"})).job.priority.value == "high"
    with pytest.raises(InvalidJob, match=r"generation\.seed"):
        seal(job.model_copy(update={"generation": GenerationOptions().model_copy(update={"seed": "x"})}))


def test_neverending_media_end_at_the_bound() -> None:
    def uris() -> Iterator[str]:
        while True:
            yield "/a.png"

    with pytest.raises(InvalidJob, match="media: has more than 64 items"):
        build_job({"prompt": "?", "media": uris()})


def test_fields_that_submit_knows_are_those_of_a_job() -> None:
    assert set(JobFields.__annotations__) == set(AnalysisJob.model_fields)


@pytest.mark.parametrize("job", ["What is it?", ["a"], None, 7, {1: 2}])
def test_one_of_many_that_is_no_job_is_refused(job: Any) -> None:
    (answer,) = CLIENT.submit_many([job])
    assert isinstance(answer, InvalidJob)
    assert_readable(str(answer))
