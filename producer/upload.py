"""Media that a producer holds in memory: small ones travel inside the job, larger ones by way of a store."""

import base64
import hashlib
import io
import os
import sys
import threading
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, TypeGuard

from keye.config.faults import InvalidJob, UploadFailed
from keye.config.formats import Format, format_of
from keye.config.host import install_command
from keye.config.job import MAX_INLINE_BYTES, MAX_INLINE_URI_CHARS
from keye.config.settings import ProducerSettings

if TYPE_CHECKING:
    from PIL.Image import Image
    from types_boto3_s3 import S3Client

# Modes that PNG holds as they are.
_PNG_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "I;16"})


def references_of(media: Sequence[Any], settings: ProducerSettings) -> list[Any]:
    """As `reference_of` for each; what the job has no room for inside is uploaded."""
    references, room = [], MAX_INLINE_URI_CHARS
    for index, medium in enumerate(media):
        reference = reference_of(medium, index, settings, room)
        if isinstance(reference, dict) and reference["uri"].startswith("data:"):
            room -= len(reference["uri"])
        references.append(reference)
    return references


def reference_of(medium: Any, index: int, settings: ProducerSettings, room: int = MAX_INLINE_URI_CHARS) -> Any:
    """What a job holds in place of bytes or a PIL image: a part with a `data:` or `s3:` URI. Other media as they are.

    `room` is how many characters of `data:` URIs the job may still hold.

    Uploaded objects are called by their content's hash, so that the same bytes are the same job. They stay until the
    bucket's own rules remove them. Raises `InvalidJob` or `UploadFailed`.
    """
    if _is_picture(medium):
        content = _encode(medium)
    elif isinstance(medium, bytes | bytearray | memoryview):
        content = bytes(medium)
    else:
        return medium
    content_format = format_of(content)
    if content_format.media_type is None:
        raise InvalidJob(
            f"1 fault: media.{index}: begins like no image or video that is known. Give its URI in a part."
        )
    head = f"data:{content_format.mime};base64,"
    if len(content) <= MAX_INLINE_BYTES and len(head) + 4 * -(-len(content) // 3) <= room:
        uri = head + base64.b64encode(content).decode()
    elif settings.upload_prefix:
        uri = _upload(content, content_format, index, settings.upload_prefix, settings.s3_endpoint_url)
    else:
        raise InvalidJob(
            f"1 fault: media.{index}: has {len(content):,} bytes, and no more than {MAX_INLINE_BYTES:,}, of all media "
            f"together {MAX_INLINE_URI_CHARS // 4 * 3:,}, travel inside a job. "
            "Set KEYE_UPLOAD_PREFIX=s3://bucket/prefix to have it uploaded, or upload it and give its URI."
        )
    return {"type": content_format.media_type, "uri": uri}


def _is_picture(medium: Any) -> "TypeGuard[Image]":
    # Who holds a picture has loaded Pillow; nobody else should have to.
    pillow = sys.modules.get("PIL.Image")
    return pillow is not None and isinstance(medium, pillow.Image)


def _encode(picture: "Image") -> bytes:
    """As PNG: the model sees the very pixels that the caller sees, upright."""
    from PIL import ImageOps

    upright = ImageOps.exif_transpose(picture)
    if upright.mode not in _PNG_MODES:
        upright = upright.convert("I;16" if upright.mode == "I" else "RGB")
    file = io.BytesIO()
    # The caller waits for this: the least compression takes a third of the time and a tenth more room.
    upright.save(file, "PNG", compress_level=1)
    return file.getvalue()


def _upload(content: bytes, content_format: Format, index: int, prefix: str, endpoint_url: str | None) -> str:
    try:
        from botocore.exceptions import BotoCoreError, ClientError

        client = _client(os.getpid(), endpoint_url)
    except ImportError:
        raise UploadFailed.of(index, prefix, f"boto3 is not installed: {install_command('upload')}") from None
    bucket, _, folder = prefix.removeprefix("s3://").partition("/")
    name = hashlib.sha256(content).hexdigest() + content_format.suffixes[0]
    key = "/".join(filter(None, (folder.strip("/"), name)))
    try:
        client.upload_fileobj(io.BytesIO(content), bucket, key, ExtraArgs={"ContentType": content_format.mime})
    except ClientError as error:
        raise UploadFailed.of(index, prefix, error.response.get("Error", {}).get("Code", "unknown")) from None
    except BotoCoreError as error:
        raise UploadFailed.of(index, prefix, type(error).__name__) from None
    return f"s3://{bucket}/{key}"


_making_client = threading.Lock()


def _client(pid: int, endpoint_url: str | None) -> "S3Client":
    # Threads may share a client but not make one; forked children may not even share it.
    with _making_client:
        return _make_client(pid, endpoint_url)


@cache
def _make_client(pid: int, endpoint_url: str | None) -> "S3Client":
    import boto3
    from botocore.config import Config

    options = Config(
        retries={"mode": "standard", "total_max_attempts": 3},
        s3={"addressing_style": "path" if endpoint_url else "auto"},
    )
    return boto3.session.Session().client("s3", endpoint_url=endpoint_url, config=options)
