"""Media as a producer gives them: small ones travel inside the job, larger ones by way of a store."""

import base64
import hashlib
import inspect
import io
import os
import sys
import threading
from collections.abc import Iterable, Mapping
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeGuard

from keye.config.contract import Contract, escaped, name_kind
from keye.config.faults import UploadFailed, install_command
from keye.config.formats import format_of, media_type_of
from keye.config.job import MAX_INLINE_BYTES, MAX_INLINE_URI_CHARS, MAX_MEDIA
from keye.config.settings import ProducerSettings

if TYPE_CHECKING:
    from PIL.Image import Image
    from types_boto3_s3 import S3Client

# Modes that PNG holds as they are.
_PNG_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "I;16"})


class Media:
    """What was given as the media of one job, as its parts. `faults` tell what can be none, each by its place.

    Bytes, open files and PIL images travel inside the job as long as it has room. The others are uploaded, once the
    rest of the job is known to be right, and are called by their content's hash, so that the same bytes are the same
    job. They stay until the bucket's own rules remove them.
    """

    def __init__(self, given: Any, settings: ProducerSettings | None) -> None:
        self.faults: list[str] = []
        self._prefix = settings.upload_prefix if settings else None
        self._endpoint_url = settings.s3_endpoint_url if settings else None
        self._room = MAX_INLINE_URI_CHARS
        self._uploads: list[tuple[int, bytes, str, str, str]] = []
        # One more than a job may hold is enough to be told of; a generator need not end.
        self.parts = [self._part_of(medium, i) for i, medium in enumerate(islice(_each_of(given), MAX_MEDIA + 1))]

    def upload(self) -> None:
        """Raises `UploadFailed`."""
        for index, content, mime, bucket, key in self._uploads:
            try:
                from botocore.exceptions import BotoCoreError, ClientError

                with _making_client:
                    client = _client(os.getpid(), self._endpoint_url)
                client.upload_fileobj(io.BytesIO(content), bucket, key, ExtraArgs={"ContentType": mime})
            except ImportError:
                fault = f"boto3 is not installed: {install_command('upload')}"
            except ClientError as error:
                fault = error.response.get("Error", {}).get("Code", "unknown")
            except BotoCoreError as error:
                fault = type(error).__name__
            except ValueError:
                fault = "the endpoint is no URL"
            else:
                continue
            raise UploadFailed(
                f"media.{index} could not be uploaded to {self._prefix} ({fault}). Check KEYE_UPLOAD_PREFIX, "
                "KEYE_S3_ENDPOINT_URL and the credentials, or upload it yourself and give its URI."
            )

    def _part_of(self, medium: Any, index: int) -> Any:
        try:
            if isinstance(medium, Mapping | Contract):
                return medium
            if isinstance(medium, str | os.PathLike):
                uri = os.fsdecode(medium)
                if media_type := media_type_of(uri):
                    return {"type": media_type, "uri": uri}
                raise _NoMedium(
                    "neither its suffix nor bytes that could be read here tell image from video. "
                    "Give an ImagePart or a VideoPart."
                )
            return self._hold(_content_of(medium), index)
        except _NoMedium as fault:
            self.faults.append(f"media.{index}: {fault}")
            # In its place, so that the places of the others, and their faults, can be told.
            return {"type": "image", "uri": "/"}

    def _hold(self, content: bytes, index: int) -> dict[str, str]:
        content_format = format_of(content)
        if content_format.media_type is None:
            raise _NoMedium("begins like no image or video that is known. Give its URI in a part.")
        head = f"data:{content_format.mime};base64,"
        num_chars = len(head) + 4 * -(-len(content) // 3)
        if len(content) <= MAX_INLINE_BYTES and num_chars <= self._room:
            self._room -= num_chars
            return {"type": content_format.media_type, "uri": head + base64.b64encode(content).decode()}
        if not self._prefix:
            raise _NoMedium(
                f"has {len(content):,} bytes, and no more than {MAX_INLINE_BYTES:,}, of all media together "
                f"{MAX_INLINE_URI_CHARS // 4 * 3:,}, travel inside a job. "
                "Set KEYE_UPLOAD_PREFIX=s3://bucket/prefix to have it uploaded, or upload it and give its URI."
            )
        bucket, _, folder = self._prefix.removeprefix("s3://").partition("/")
        name = hashlib.sha256(content).hexdigest() + content_format.suffixes[0]
        key = "/".join(filter(None, (folder.strip("/"), name)))
        self._uploads.append((index, content, content_format.mime, bucket, key))
        return {"type": content_format.media_type, "uri": f"s3://{bucket}/{key}"}


class _NoMedium(Exception):
    pass


def _each_of(given: Any) -> Iterable[Any]:
    if given is None:
        return ()
    is_one = isinstance(given, str | bytes | bytearray | memoryview | Mapping | Contract)
    is_one = is_one or not isinstance(given, Iterable) or _is_file(given) or hasattr(given, "__array__")
    return (given,) if is_one else given


def _content_of(medium: Any) -> bytes:
    if isinstance(medium, bytes | bytearray | memoryview):
        return bytes(medium)
    if _is_picture(medium):
        return _encode(medium)
    if _is_file(medium):
        return _read(medium)
    if hasattr(medium, "__array__"):
        raise _NoMedium(
            f"is {name_kind(medium)}: nothing tells the order and the range of its numbers. Give a PIL image, as "
            "PIL.Image.fromarray makes it of RGB from 0 to 255, or the bytes of a file."
        )
    raise _NoMedium(
        f"is {name_kind(medium)}. Give a path or URI, the bytes of a file, a file opened with 'rb', a PIL image, "
        "an ImagePart or a VideoPart."
    )


def _is_file(medium: Any) -> bool:
    # Asynchronous ones cannot be read here.
    return callable(read := getattr(medium, "read", None)) and not inspect.iscoroutinefunction(read)


def _read(file: Any) -> bytes:
    """All of it, wherever it stands: who wrote into it stands at its end."""
    if not isinstance(file, io.TextIOBase):
        try:
            if file.seekable():
                file.seek(0)
            content = file.read()
        except (OSError, ValueError, AttributeError) as fault:
            raise _NoMedium(f"is a file that cannot be read ({escaped(str(fault))}).") from None
        if isinstance(content, bytes):
            return content
    raise _NoMedium("is a file opened as text. Open it with 'rb'.")


def _is_picture(medium: Any) -> "TypeGuard[Image]":
    # Who holds a picture has loaded Pillow; nobody else should have to.
    pillow = sys.modules.get("PIL.Image")
    return pillow is not None and isinstance(medium, pillow.Image)


def _encode(picture: "Image") -> bytes:
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
        raise _NoMedium(f"is a PIL image that cannot be read ({escaped(str(fault))}).") from None
    return file.getvalue()


# Threads may share a client but not make one; forked children may not even share it.
_making_client = threading.Lock()


@cache
def _client(pid: int, endpoint_url: str | None) -> "S3Client":
    import boto3
    from botocore.config import Config

    options = Config(
        retries={"mode": "standard", "total_max_attempts": 3},
        s3={"addressing_style": "path" if endpoint_url else "auto"},
    )
    return boto3.session.Session().client("s3", endpoint_url=endpoint_url, config=options)
