"""What a medium may be, in `media` and in a chat alike: files of this machine, arrays, OpenAI's parts, odd objects."""

import base64
import io
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from keye.config.faults import InvalidJob
from keye.config.job import ImagePart, TextPart, VideoPart
from keye.config.settings import Settings
from keye.producer.client import build_job
from keye.producer.upload import Media

SETTINGS = Settings(upload_prefix=None)
PNG = b"\x89PNG\r\n\x1a\n"
MP4 = b"\0\0\0\x18ftypisom"
LARGE = b"\xff\xd8\xff" + bytes(2**20)


def ask(*media: Any) -> tuple[ImagePart | VideoPart, ...]:
    return build_job({"prompt": "?", "media": media}, Media(SETTINGS)).media


def chat(*content: Any) -> tuple[TextPart | ImagePart | VideoPart, ...]:
    return build_job({"messages": {"role": "user", "content": content}}, Media(SETTINGS)).all_parts()


def content_of(part: TextPart | ImagePart | VideoPart) -> bytes:
    assert not isinstance(part, TextPart)
    return base64.b64decode(part.uri.partition(";base64,")[2])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this process runs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.holds(
    "docs/producers.md#what-a-medium-may-be", "a relative path, alone or as the `uri` of a part, is a file of yours"
)
@pytest.mark.holds("docs/producers.md#what-a-medium-may-be", '`Path("cat.jpg")`, or a relative path as a string')
@pytest.mark.parametrize("name", ["clip", "./clip", "7:30.jpg", "A B"])
def test_content_of_a_file_of_this_machine_travels(folder: Path, name: str) -> None:
    (folder / name).write_bytes(MP4)
    with os.scandir(folder) as entries:
        given = [name, Path(name), folder / name, next(entries)]
    assert [(part.type, content_of(part)) for part in ask(*given)] == [("video", MP4)] * 4


@pytest.mark.holds("docs/producers.md#what-a-medium-may-be", "What is sent must begin like an image or a video")
def test_content_and_not_the_name_tells_what_a_file_is(folder: Path) -> None:
    (folder / "clip.mp4").write_bytes(PNG)
    (folder / "cat.png").write_bytes(MP4)
    assert [part.type for part in ask("clip.mp4", Path("cat.png"))] == ["image", "video"]
    with pytest.raises(InvalidJob, match=r"media\.0: is no video; it looks like PNG"):
        ask({"type": "video", "uri": "clip.mp4"})
    (folder / "moving").write_bytes(b"GIF89a")
    assert ask({"type": "video", "uri": Path("moving"), "fps": 2})[0].type == "video"


@pytest.mark.holds("docs/producers.md#what-a-medium-may-be", "a URI or an absolute path as a string")
def test_what_the_workers_may_have_goes_by_reference(folder: Path) -> None:
    (folder / "cat.png").write_bytes(PNG)
    uris = [str(folder / "cat.png"), (folder / "cat.png").as_uri(), "s3://b/cat.png", "https://h/cat.png"]
    assert [part.uri for part in ask(*uris, folder / "absent.mp4")] == [*uris, str(folder / "absent.mp4")]
    assert ask({"type": "video", "uri": folder / "absent"})[0].uri == str(folder / "absent")


@pytest.mark.holds(
    "docs/producers.md#what-a-medium-may-be", "the reference, with options", '`{"type": "video", "uri": ..., "fps": 1}`'
)
def test_options_go_with_whatever_a_medium_may_be(folder: Path) -> None:
    (folder / "clip.mp4").write_bytes(MP4)
    given = ["clip.mp4", Path("clip.mp4"), MP4, io.BytesIO(MP4)]
    parts = ask(*({"type": "video", "uri": uri, "fps": 1} for uri in given), {"uri": "clip.mp4", "fps": 1})
    assert {(part.fps, content_of(part)) for part in parts if isinstance(part, VideoPart)} == {(1, MP4)}
    assert len(parts) == 5


@pytest.mark.parametrize("make", [lambda: ImagePart(uri="cat.png"), lambda: ImagePart(uri=Path("/cat.png"))])
def test_part_made_by_hand_tells_how_a_file_itself_is_sent(make: Callable[[], object]) -> None:
    with pytest.raises(InvalidJob, match=r'give the client \{"type": \.\.\., "uri": Path\(\.\.\.\)\}'):
        make()


@pytest.mark.holds("docs/producers.md#what-a-medium-may-be", "given | what the workers get")
@pytest.mark.holds(
    "docs/producers.md#what-a-medium-may-be",
    "`media` takes one of these, or a list of them in order",
    "client.submit(messages=",
)
def test_chat_may_hold_what_media_may(folder: Path) -> None:
    (folder / "clip.mp4").write_bytes(MP4)
    picture, array = Image.new("RGB", (30, 20), "red"), np.zeros((20, 30), np.uint8)
    given = ["a", PNG, Path("clip.mp4"), "b", picture, array, {"type": "video", "uri": "clip.mp4"}, io.BytesIO(PNG)]
    parts = chat(*given, TextPart(text="c"), ImagePart(uri="/d.png"), {"type": "text", "text": "clip.mp4"})
    words = [part.text if isinstance(part, TextPart) else part.type for part in parts]
    assert words == ["a", "image", "video", "b", "image", "image", "video", "image", "c", "image", "clip.mp4"]
    assert content_of(parts[2]) == content_of(parts[6]) == MP4


def test_every_turn_of_a_chat_shares_the_room_of_the_job() -> None:
    photo = b"\xff\xd8\xff" + bytes(2**20 - 3)
    turns = [{"role": role, "content": ["?", photo, photo, photo]} for role in ("user", "assistant", "user")]
    with pytest.raises(InvalidJob, match=r"^1 fault: messages\.2\.content\.3: has 1,048,576 bytes"):
        build_job({"messages": (turn for turn in turns)}, Media(SETTINGS))
    inside = {"role": "user", "content": [ImagePart(uri=part.uri) for part in ask(*[photo] * 8)]}
    with pytest.raises(InvalidJob, match=r"^1 fault: messages\.1\.content\.0: has 1,048,576 bytes"):
        build_job({"messages": [inside, {"role": "user", "content": [photo]}]}, Media(SETTINGS))


def test_faults_of_a_chat_have_their_places() -> None:
    turns = [
        {"role": "system", "content": "?"},
        {"role": "user", "content": ["?", 7, {"type": "image", "uri": "/", "fps": 1}]},
    ]
    with pytest.raises(InvalidJob) as refused:
        build_job({"messages": turns}, Media(SETTINGS))
    assert "2 faults: messages.1.content.1: is a number." in str(refused.value)
    assert "messages.1.content.2.image.fps: is no field here" in str(refused.value)


OPENAI: list[tuple[dict[str, Any], ImagePart | VideoPart]] = [
    ({"type": "image_url", "image_url": {"url": "https://h/cat"}}, ImagePart(uri="https://h/cat")),
    ({"type": "image_url", "image_url": {"url": "/c", "detail": "auto"}}, ImagePart(uri="/c")),
    ({"type": "image_url", "image_url": {"url": "/c", "detail": "high"}}, ImagePart(uri="/c")),
    ({"type": "image_url", "image_url": {"url": "/c", "detail": "low"}}, ImagePart(uri="/c", max_pixels=512 * 512)),
    ({"type": "image_url", "image_url": "s3://b/cat"}, ImagePart(uri="s3://b/cat")),
    ({"type": "input_image", "image_url": "data:,x", "detail": "low"}, ImagePart(uri="data:,x", max_pixels=512 * 512)),
    ({"type": "video_url", "video_url": {"url": "file:///clip"}}, VideoPart(uri="file:///clip")),
    ({"type": "video_url", "video_url": {"url": "/clip"}, "fps": 2}, VideoPart(uri="/clip", fps=2)),
]


@pytest.mark.holds(
    "docs/producers.md#what-a-medium-may-be",
    "the reference, as OpenAI's chats have it",
    "The URLs in OpenAI's parts never are.",
)
@pytest.mark.parametrize(("part", "meant"), OPENAI)
def test_parts_as_openai_has_them_are_understood(part: dict[str, Any], meant: ImagePart | VideoPart) -> None:
    assert ask(part) == (meant,)
    assert chat(part, {"type": "input_text", "text": "?"}) == (meant, TextPart(text="?"))


@pytest.mark.parametrize(
    ("part", "sentence"),
    [
        ({"type": "image_url", "image_url": {"url": "http://h/cat.png"}}, r"\.image\.uri: .* give as https:"),
        ({"type": "image_url", "image_url": {"url": "cat.png"}}, ": is no image_url with a URL"),
        ({"type": "image_url"}, ": is no image_url with a URL"),
        ({"type": "input_image", "file_id": "7"}, ': .* "image_url": {"url"'),
        ({"type": "image_url", "image_url": {"url": "/c", "detail": "huge"}}, ": has a detail that is none of"),
        ({"type": "image_url", "image_url": {"url": "/c", "format": "png"}}, r"\.image\.format: is no field here"),
        ({"type": "file", "file": {"file_id": "7"}}, ": type is none of .*'image', 'video'"),
    ],
)
def test_parts_as_openai_has_them_are_refused_in_their_place(folder: Path, part: Any, sentence: str) -> None:
    # A chat may come from a stranger, who must not be shown what lies here.
    (folder / "cat.png").write_bytes(PNG)
    with pytest.raises(InvalidJob, match=rf"^1 fault: media\.0{sentence}"):
        ask(part)
    with pytest.raises(InvalidJob, match=rf"^1 fault: messages\.0\.content\.1{sentence}"):
        chat("?", part)


@pytest.mark.holds("docs/producers.md#what-a-medium-may-be", "an array of numpy, or what gives one")
@pytest.mark.parametrize("shape", [(20, 30), (20, 30, 3), (20, 30, 4)])
def test_arrays_of_bytes_are_pictures_pixel_for_pixel(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(7).integers(0, 256, shape, np.uint8)
    for given in (array, array[::-1][::-1], torch.from_numpy(array)):
        assert (np.asarray(Image.open(io.BytesIO(content_of(ask(given)[0])))) == array).all()
    assert len(build_job({"prompt": "?", "media": array}, Media(SETTINGS)).media) == 1


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 3)),
        np.zeros((4, 4), bool),
        np.zeros((3, 20, 30), np.uint8),
        np.zeros((0, 4), np.uint8),
        np.zeros((), np.uint8),
        np.uint8(7),
    ],
)
def test_other_arrays_are_refused_with_what_they_are(array: Any) -> None:
    with pytest.raises(InvalidJob, match=r"media\.0: is an array of shape .* and type .*\. Give uint8 from 0 to 255"):
        ask(array)


def test_arrays_without_pillow_are_refused_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(InvalidJob, match=r"pip install 'keye-worker\[upload\]'"):
        ask(np.zeros((4, 4), np.uint8))


def test_large_file_without_a_place_to_put_it_is_refused_with_what_to_do(folder: Path) -> None:
    (folder / "photo.jpg").write_bytes(LARGE)
    told = rf"media\.0: has 1,048,579 bytes.*KEYE_UPLOAD_PREFIX.*its URI, or, .* the text '{folder}/photo\.jpg'"
    for given in ("photo.jpg", Path("photo.jpg")):
        with pytest.raises(InvalidJob, match=told):
            ask(given)
    assert ask(str(folder / "photo.jpg"))[0].uri == str(folder / "photo.jpg")


def test_file_of_many_gigabytes_is_refused_without_being_read(folder: Path) -> None:
    with (folder / "clip.mp4").open("wb") as file:
        file.write(MP4)
        file.truncate(2**40)
    with pytest.raises(InvalidJob, match="has 1,099,511,627,776 bytes"):
        ask("clip.mp4")


def test_file_that_may_not_be_read_is_told(folder: Path) -> None:
    (folder / "secret.jpg").touch(mode=0)
    user = os.geteuid()
    os.seteuid(user or 65534)  # root may read all
    try:
        with pytest.raises(InvalidJob, match=r"media\.0: '.*secret\.jpg' cannot be read \(Permission denied\)"):
            ask("secret.jpg")
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("place", ["media", "messages", "messages.0.content"])
def test_list_that_raises_what_it_is_asked_is_told_of(place: str) -> None:
    odd = Raising("read")
    fields = {
        "media": {"prompt": "?", "media": odd},
        "messages": {"messages": odd},
        "messages.0.content": {"messages": [{"role": "user", "content": odd}]},
    }
    with pytest.raises(InvalidJob, match=r"^1 fault: (media|messages)\.0: reading it raised ZeroDivisionError"):
        build_job(fields[place], Media(SETTINGS))


def test_media_that_raise_in_between_are_told_of() -> None:
    def media() -> Iterator[bytes]:
        yield PNG
        raise ZeroDivisionError("the disk is gone")

    with pytest.raises(InvalidJob, match=r"^1 fault: media\.1: reading it raised ZeroDivisionError: the disk is gone$"):
        build_job({"prompt": "?", "media": media()}, Media(SETTINGS))


def test_files_of_the_caller_stay_open(folder: Path) -> None:
    (folder / "cat.png").write_bytes(PNG)
    with (folder / "cat.png").open("rb") as file, tempfile.SpooledTemporaryFile() as upload:
        upload.write(PNG)
        assert ask(file, upload) == ask(PNG, PNG)
        assert not file.closed
        assert upload.read() == b""


def test_file_that_was_written_and_not_flushed_is_whole() -> None:
    with tempfile.TemporaryFile() as file:
        file.write(PNG)
        assert content_of(ask(file)[0]) == PNG


def test_output_of_a_process_is_read_to_its_end() -> None:
    program = f"import sys; sys.stdout.buffer.write({PNG!r})"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert content_of(ask(process.stdout)[0]) == PNG


class Raising:
    """Raises whatever it is asked."""

    def __init__(self, *names: str) -> None:
        self._names = names

    def __iter__(self) -> Any:
        raise ZeroDivisionError

    def __getattr__(self, name: str) -> Any:
        if name in self._names:
            raise ZeroDivisionError("half \ud83d")
        raise AttributeError(name)


class RaisingPath(os.PathLike[str]):
    def __fspath__(self) -> str:
        raise ZeroDivisionError("half \ud83d")


class RaisingArray:
    def __array__(self) -> Any:
        raise ZeroDivisionError("on the GPU")


class RaisingFile:
    def read(self, size: int = -1) -> bytes:
        raise ZeroDivisionError("the line is dead")


class PromisingFile:
    """A read that is no coroutine function and returns one."""

    def read(self, size: int = -1) -> Any:
        async def content() -> bytes:
            return PNG

        return content()


class UploadFile:
    """As web frameworks have them."""

    file = io.BytesIO(PNG)

    async def read(self, size: int = -1) -> bytes:
        return PNG


def closed() -> Any:
    file = io.BytesIO(PNG)
    file.close()
    return file


def strange_files(folder: Path) -> None:
    (folder / "x.jpg").mkdir()
    (folder / "empty.jpg").touch()
    os.mkfifo(folder / "pipe.jpg")
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "notes.jpg").write_text("to do")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket.jpg")


ODD: dict[str, tuple[Any, str]] = {
    "path that raises": (RaisingPath(), "reading it raised ZeroDivisionError: half"),
    "array that raises": (RaisingArray(), "reading it raised ZeroDivisionError: on the GPU"),
    "file that raises": (RaisingFile(), "reading it raised ZeroDivisionError: the line is dead"),
    "object that raises": (Raising("read", "__array__"), "reading it raised ZeroDivisionError"),
    "closed file": (closed(), "file that cannot be read .*closed"),
    "file of text": (io.StringIO("?"), "gives no bytes. Open it with 'rb'"),
    "asynchronous file": (UploadFile(), r"give its `\.file`, where it has one, or what `await file\.read\(\)` returns"),
    "file that promises": (PromisingFile(), "gives no bytes"),
    "directory": (Path("x.jpg"), r"'x\.jpg' cannot be read \(Is a directory\)"),
    "empty": (Path("empty.jpg"), "is empty"),
    "no bytes": (b"", "is empty"),
    "pipe": (Path("pipe.jpg"), r"'pipe\.jpg' is a pipe or a device"),
    "device": (Path("/dev/zero"), "'/dev/zero' is a pipe or a device"),
    "socket": (Path("socket.jpg"), r"'socket\.jpg' cannot be read"),
    "loop": (Path("loop.jpg"), r"'loop\.jpg' cannot be read \(Too many levels"),
    "text": (Path("notes.jpg"), "begins like no image or video that is known; it looks like text"),
    "absent": (Path("absent.jpg"), r"there is no 'absent\.jpg' in /"),
    "beneath a file": (Path("notes.jpg/x.jpg"), "there is no"),
    "no path": (Path(), "Is a directory"),
    "NUL": (Path("a\0b.jpg"), r"'a\\x00b\.jpg' cannot be read \(embedded null"),
    "half a character": (Path("\ud83d.jpg"), r"'\\ud83d\.jpg' cannot be read"),
    "byte that is no UTF-8": (Path("\udcff.jpg"), r"there is no '\\udcff\.jpg'"),
    "absent byte that is no UTF-8": (Path("/\udcff.jpg"), "holds half a character"),
    "cursor that moves": (Path("a\x1b[2J.jpg"), r"there is no 'a\\x1b\[2J\.jpg'"),
    "long name": (Path("x" * 10_000), r"'x{200}' cannot be read \(File name too long\)"),
    "list": ([PNG], "is a list"),
    "nothing": (None, "is nothing"),
    "number": (7, "is a number"),
    "file that is a number": ({"type": "image", "uri": 7}, "is a number"),
    "odd type": ({"type": ["image"], "uri": PNG}, "type is none of .*'image', 'video'"),
}


@pytest.mark.parametrize("odd", ODD)
def test_odd_medium_is_refused_in_its_place(folder: Path, odd: str) -> None:
    strange_files(folder)
    medium, sentence = ODD[odd]
    for given in (medium, medium if isinstance(medium, dict) else {"type": "image", "uri": medium}):
        for place, fields in {
            r"media\.1": {"prompt": "?", "media": [PNG, given]},
            r"messages\.0\.content\.1": {"messages": [{"role": "user", "content": ["?", given]}]},
        }.items():
            with pytest.raises(InvalidJob, match=rf"^1 fault: {place}[a-z.]*: .*{sentence}") as refused:
                build_job(fields, Media(SETTINGS))
            str(refused.value).encode()
            if "raises" in odd:
                assert isinstance(refused.value.__cause__, ZeroDivisionError)
