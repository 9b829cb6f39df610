"""What a medium that a producer gives is: a URI, which travels as it is, or content, which is opened to be read.

Here nothing is sent, and nothing is known of the job.
"""

import hashlib
import inspect
import io
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import IO, TYPE_CHECKING, Any, TypeGuard

from keye.config.contract import MAX_PLACE_CHARS, Contract, escaped, name_kind
from keye.config.faults import install_command
from keye.config.formats import BASE64_INLINE, read_inline
from keye.config.job import MAX_INLINE_BYTES

if TYPE_CHECKING:
    from PIL.Image import Image

# Modes that PNG holds as they are.
_PNG_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "I;16"})
# What OpenAI's chats call an image and a video.
_OPENAI_TYPES = {"image_url": "image", "input_image": "image", "video_url": "video"}
_LOW_DETAIL_PIXELS = 512 * 512
_BYTES_AT_A_TIME = 2**20


class NoMedium(Exception):
    """What was given is no medium; says what it is and what to give."""


class OpenFile:
    """A seekable file whose content is read more than once, and is the same each time; it stays open.

    `path` is the absolute one where it is a file of this machine. Raises `NoMedium` where it cannot be read or changes.
    """

    def __init__(self, file: IO[bytes], path: str | None = None) -> None:
        self.path = path
        self._file = file
        with _telling_of_a_file():
            file.seek(0, os.SEEK_END)
            self.size = file.tell()
            # Whoever wrote into it stands at its end.
            file.seek(0)
        # What was written into it reached the disk as it was sought in, no earlier.
        self._first = self._state()

    @property
    def has_changed(self) -> bool:
        return self._state() != self._first

    def read(self, size: int = -1) -> bytes:
        content = _read(self._file, size)
        if self.has_changed:
            raise NoMedium("changed while it was read. Submit it when it is written to its end.")
        return content

    def digest(self) -> str:
        """SHA-256, as hexadecimal digits."""
        digest = hashlib.sha256()
        self.seek(0)
        for _ in range(0, self.size, _BYTES_AT_A_TIME):
            digest.update(self.read(_BYTES_AT_A_TIME))
        return digest.hexdigest()

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        """Nothing: boto3 closes what it has sent, and a caller goes on with his file."""

    def _state(self) -> tuple[int, int] | None:
        # Others are no files of the disk, or become one by being asked, as a SpooledTemporaryFile does.
        if not isinstance(self._file, io.FileIO | io.BufferedReader | io.BufferedRandom):
            return None
        try:
            found = os.fstat(self._file.fileno())
        except (OSError, ValueError):
            return None
        return found.st_size, found.st_mtime_ns


def is_many(given: Any) -> TypeGuard[Iterable[Any]]:
    """Whether it is a list, or another iterable, of media and not one of them, nor a text."""
    is_one = isinstance(given, str | bytes | bytearray | memoryview | Mapping | Contract | os.PathLike)
    return not (is_one or not isinstance(given, Iterable) or hasattr(given, "read") or hasattr(given, "__array__"))


def is_uri(text: str) -> bool:
    """Or an absolute path; all else is a path relative to where this process runs."""
    return re.match(r"/|[A-Za-z][A-Za-z0-9+.-]*:", text) is not None


def look_at(given: Any, opened: ExitStack) -> str | OpenFile:
    """Its URI or absolute path where that is what travels, else its content, which `opened` closes.

    Raises `NoMedium`, and what the methods of `given` raise.
    """
    if isinstance(given, os.PathLike):
        return _open(os.fsdecode(given), opened)
    if isinstance(given, str):
        if inline := BASE64_INLINE.match(given):
            return _inline(given, inline.end())
        return given if is_uri(given) else _open(given, opened)
    if isinstance(given, bytes | bytearray | memoryview):
        return OpenFile(io.BytesIO(given))
    if _is_picture(given):
        return OpenFile(_encode(given))
    if callable(getattr(given, "read", None)):
        return OpenFile(_seekable(given, opened))
    if hasattr(given, "__array__"):
        return OpenFile(_encode(_picture_of(given)))
    why = ", as cv2.imread gives where it can read no file" if given is None else ""
    raise NoMedium(
        f"is {name_kind(given)}{why}. Give a path or URI, the bytes of a file, a file opened with 'rb', a PIL image, "
        "an array, an ImagePart or a VideoPart."
    )


def in_our_words(part: Mapping[str, Any]) -> dict[str, Any]:
    """A part as it is, or one of OpenAI's or of the model's own scripts as one of ours. Raises `NoMedium`."""
    fields = dict(part)
    kind = fields.get("type")
    if kind in ("image", "video") and kind in fields and "uri" not in fields:
        fields["uri"] = fields.pop(kind)
    if kind == "input_text":
        fields["type"] = "text"
    if not isinstance(kind, str) or kind not in _OPENAI_TYPES:
        return fields
    name = "image_url" if kind == "input_image" else kind
    uri = fields.pop(name, None)
    if isinstance(uri, Mapping):
        fields |= uri
        uri = fields.pop("url", None)
    # Chats are often handed on from strangers, who must not name files of this machine.
    if uri is None or (isinstance(uri, str) and not is_uri(uri)):
        raise NoMedium(
            f'is no {kind} with a URL, such as {{"type": "{kind}", "{name}": {{"url": "https://host/path"}}}}'
        )
    detail = fields.pop("detail", "auto")
    if detail not in ("auto", "high", "low", None):
        raise NoMedium("has a detail that is none of auto, high and low.")
    if detail == "low":
        fields.setdefault("max_pixels", _LOW_DETAIL_PIXELS)
    return {**fields, "type": _OPENAI_TYPES[kind], "uri": uri}


def _inline(uri: str, start: int) -> str | OpenFile:
    """Workers read no more than a little from a URI; the content of a larger one is as if given by itself."""
    if len(uri) - start <= 4 * -(-MAX_INLINE_BYTES // 3):
        return uri
    try:
        return OpenFile(io.BytesIO(read_inline(uri)))
    except ValueError:
        raise NoMedium("is a data: URI whose base64 cannot be read.") from None


def _open(path: str, opened: ExitStack) -> str | OpenFile:
    shown = f"'{escaped(path[:MAX_PLACE_CHARS])}'"
    try:
        file = opened.enter_context(open(path, "rb", opener=open_at_once))  # noqa: SIM115
        is_file = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        if os.path.isabs(path):
            return path  # of the workers' disk
        raise NoMedium(f"there is no {shown} in {escaped(os.getcwd())}.") from None
    except (OSError, ValueError) as fault:
        reason = (isinstance(fault, OSError) and fault.strerror) or str(fault)
        raise NoMedium(f"{shown} cannot be read ({escaped(reason)}).") from None
    if not is_file:
        raise NoMedium(f"{shown} is a pipe or a device. Give a file.")
    return OpenFile(file, os.path.abspath(path))


def open_at_once(path: str, flags: int) -> int:
    """An opener: a pipe would keep us waiting for whoever writes into it."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _seekable(file: Any, opened: ExitStack) -> IO[bytes]:
    _read(file, 0)
    with _telling_of_a_file():
        if getattr(file, "seekable", bool)():
            return file  # type: ignore[no-any-return]
        copy = opened.enter_context(tempfile.SpooledTemporaryFile(MAX_INLINE_BYTES))  # noqa: SIM115
        shutil.copyfileobj(file, copy)
        return copy


def _read(file: Any, size: int) -> bytes:
    content = None
    if not inspect.iscoroutinefunction(file.read):
        with _telling_of_a_file():
            content = file.read(size)
    if isinstance(content, bytes):
        return content
    if inspect.iscoroutine(content):
        content.close()
    raise NoMedium(
        "is a file that gives no bytes. Open it with 'rb'; of an asynchronous one give its `.file`, where it has one, "
        "or what `await file.read()` returns."
    )


@contextmanager
def _telling_of_a_file() -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, AttributeError) as fault:
        raise NoMedium(f"is a file that cannot be read ({escaped(str(fault))}).") from None


def _is_picture(medium: Any) -> "TypeGuard[Image]":
    # Who holds a picture has loaded Pillow; nobody else should have to.
    pillow = sys.modules.get("PIL.Image")
    return pillow is not None and isinstance(medium, pillow.Image)


def _picture_of(array: Any) -> "Image":
    # A numpy array at last, whoever it is of: numpy need not be here.
    array = array.__array__()
    shape, dtype = tuple(array.shape), str(array.dtype)
    if dtype != "uint8" or 0 in shape or (len(shape) != 2 and (len(shape) != 3 or shape[2] not in (3, 4))):
        raise NoMedium(
            f"is an array of shape {shape} and type {dtype}. Give uint8 from 0 to 255 of shape (height, width), "
            "(height, width, 3) in the order red, green, blue, or (height, width, 4) with alpha; of several, give each."
        )
    try:
        from PIL import Image
    except ImportError:
        reason = f"is an array, and Pillow, which makes a picture of it, is not installed: {install_command('upload')}"
        raise NoMedium(reason) from None
    return Image.fromarray(array)


def _encode(picture: "Image") -> io.BytesIO:
    """As PNG: the model sees the very pixels that the caller sees, upright."""
    from PIL import ImageOps

    file = io.BytesIO()
    try:
        upright = ImageOps.exif_transpose(picture)
        if upright.mode not in _PNG_MODES:
            upright = upright.convert("I;16" if upright.mode == "I" else "RGB")
        # The caller waits for this: the least compression takes a third of the time and a tenth more room.
        upright.save(file, "PNG", compress_level=1)
    except Exception as fault:
        # Pillow reads lazily, and its readers raise whatever they meet.
        raise NoMedium(f"is a PIL image that cannot be read ({escaped(str(fault))}).") from None
    return file
