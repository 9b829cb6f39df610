"""The media of a job as its producer gives them, made its parts: small ones travel inside, larger ones by a store."""

import base64
import os
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from functools import cache
from itertools import islice
from typing import IO, TYPE_CHECKING, Any, NamedTuple, Self, cast

from keye.config.aws import load_aws_names
from keye.config.contract import Contract, escaped
from keye.config.faults import UploadFailed, install_command
from keye.config.formats import HEAD_BYTES, Format, format_of, media_type_of
from keye.config.job import MAX_INLINE_BYTES, MAX_INLINE_URI_CHARS, MAX_MEDIA, ChatMessage
from keye.config.settings import ProducerSettings
from keye.producer.medium import NoMedium, OpenFile, in_our_words, is_many, look_at

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client


class Upload(NamedTuple):
    place: str
    file: OpenFile
    mime: str
    bucket: str
    key: str


class Media:
    """What was given as the media of one job, in `media` or among its messages, as parts. `faults` tell by their places
    what can be none; `cause` is the first error that something given raised by itself.

    Content travels inside the job as long as it has room. The rest is uploaded, once all else of the job is known to
    be right, and is called by its hash, so that the same content is the same job. It stays until the bucket's own rules
    remove it. The files of the caller stay open, all others are closed at the end of the `with`.
    """

    def __init__(self, settings: ProducerSettings | None) -> None:
        self.faults: list[str] = []
        self.cause: Exception | None = None
        self._prefix = settings.upload_prefix if settings else None
        self._endpoint_url = settings.s3_endpoint_url if settings else None
        self._room = MAX_INLINE_URI_CHARS
        self._opened = ExitStack()
        self._uploads: list[Upload] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.close()

    def in_media(self, given: Any) -> list[Any]:
        """The parts that `media` comes to; one alone needs no list."""
        return self._parts_of(given, "media", is_chat=False)

    def in_messages(self, given: Any) -> Any:
        """The messages, with parts for their contents. What is no message is left for the schema to refuse."""
        if isinstance(given, Mapping | ChatMessage):
            given = [given]
        messages: list[Any] = []
        try:
            if not is_many(given):
                return given
            for message in given:
                messages.append(self._message_of(message, f"messages.{len(messages)}.content"))
        except Exception as error:
            self._blame(error, f"messages.{len(messages)}")
            messages.append({"role": "user", "content": ""})
        return messages

    def upload(self) -> None:
        """Raises `UploadFailed`."""
        for place, file, mime, bucket, key in self._uploads:
            try:
                from botocore.exceptions import BotoCoreError, ClientError
                from botocore.parsers import ResponseParserError

                from keye.config.bounded_s3 import code_of

                client = s3_client(self._endpoint_url)
                file.seek(0)
                # All of a file that boto3 asks for.
                client.upload_fileobj(cast(IO[bytes], file), bucket, key, ExtraArgs={"ContentType": mime})
            except ImportError:
                fault = f"boto3 is not installed: {install_command('upload')}"
            except ClientError as error:
                fault = code_of(error)
            except (BotoCoreError, NoMedium) as error:
                # What reading it raises comes out as either.
                if file.has_changed:
                    raise UploadFailed(f"{place} changed while it was uploaded. Submit it when it is whole.") from None
                fault = str(error) if isinstance(error, NoMedium) else type(error).__name__
            except ValueError:
                fault = "the endpoint is no URL"
            except (LookupError, TypeError, ResponseParserError) as error:
                # botocore takes what a server says for what S3 would say.
                fault = f"it answered as no S3 does: {type(error).__name__}"
            else:
                continue
            raise UploadFailed(
                f"{place} could not be uploaded to {self._prefix} ({fault}). Check KEYE_UPLOAD_PREFIX, "
                "KEYE_S3_ENDPOINT_URL and the credentials, or upload it yourself and give its URI."
            )

    def _message_of(self, message: Any, place: str) -> Any:
        if isinstance(message, ChatMessage):
            if is_many(message.content):
                # Parts already, whose room counts.
                self._parts_of(message.content, place, is_chat=True)
            return message
        if not isinstance(message, Mapping) or not is_many(content := message.get("content")):
            return message
        return {**message, "content": self._parts_of(content, place, is_chat=True)}

    def _parts_of(self, given: Any, place: str, is_chat: bool) -> list[Any]:
        parts: list[Any] = []
        try:
            if not is_many(given):
                given = () if given is None else (given,)
            # One more than a job may hold is enough to be told of; a generator need not end.
            for each in islice(given, None if is_chat else MAX_MEDIA + 1):
                if is_chat and isinstance(each, str):
                    parts.append({"type": "text", "text": each})
                else:
                    parts.append(self._part_of(each, f"{place}.{len(parts)}"))
        except Exception as error:
            self._blame(error, f"{place}.{len(parts)}")
        return parts

    def _part_of(self, given: Any, place: str) -> Any:
        fields: dict[str, Any] = {}
        try:
            if isinstance(given, Contract):
                self._take_room(getattr(given, "uri", ""))
                return given
            if isinstance(given, Mapping):
                fields = in_our_words(given)
                if "uri" not in fields:
                    return fields
                given = fields["uri"]
            medium = self._look(given)
            if isinstance(medium, OpenFile):
                return {**fields, **self._hold(medium, fields.get("type"), place)}
            self._take_room(medium)
            if media_type := fields.get("type") or media_type_of(medium):
                return {**fields, "type": media_type, "uri": medium}
            self.faults.append(
                f"{place}: neither its suffix nor bytes that could be read here tell image from video. "
                "Give an ImagePart or a VideoPart."
            )
        except NoMedium as fault:
            self.faults.append(f"{place}: {fault}")
        except Exception as error:
            self._blame(error, place)
        # In its place, so that the places of the others, and their faults, can be told.
        return {"type": "image", **fields, "uri": "/"}

    def _look(self, given: Any) -> str | OpenFile:
        return look_at(given, self._opened)

    def _blame(self, error: Exception, place: str) -> None:
        self.faults.append(f"{place}: reading it raised {type(error).__name__}: {escaped(str(error))}")
        self.cause = self.cause or error

    def _take_room(self, uri: str) -> None:
        if uri[:5].lower() == "data:":
            self._room -= len(uri)

    def _hold(self, file: OpenFile, media_type: Any, place: str) -> dict[str, Any]:
        """Its type, where none is given, and its URI."""
        if file.size == 0:
            raise NoMedium("is empty.")
        found = format_of(file.read(HEAD_BYTES))
        if found.media_type is None:
            raise NoMedium(f"begins like no image or video that is known; it looks like {found.name}.")
        is_other = found.media_type != "image" if media_type == "image" else found.demuxer is None
        if media_type in ("image", "video") and is_other:
            raise NoMedium(f"is no {media_type}; it looks like {found.name}.")
        return {"type": media_type or found.media_type, "uri": self._uri_of(file, found, place)}

    def _uri_of(self, file: OpenFile, found: Format, place: str) -> str:
        head = f"data:{found.mime};base64,"
        num_chars = len(head) + 4 * -(-file.size // 3)
        if file.size <= MAX_INLINE_BYTES and num_chars <= self._room:
            self._room -= num_chars
            file.seek(0)
            return head + base64.b64encode(file.read()).decode()
        if not self._prefix:
            raise NoMedium(
                f"has {file.size:,} bytes, and no more than {MAX_INLINE_BYTES:,}, of all media together "
                f"{MAX_INLINE_URI_CHARS // 4 * 3:,}, travel inside a job. "
                "Set KEYE_UPLOAD_PREFIX=s3://bucket/prefix to have it uploaded, or upload it and give its URI"
                + (f", or, where workers read the same disk, the text '{escaped(file.path)}'." if file.path else ".")
            )
        bucket, _, folder = self._prefix.removeprefix("s3://").partition("/")
        key = "/".join(filter(None, (folder.strip("/"), file.digest() + found.suffixes[0])))
        self._uploads.append(Upload(place, file, found.mime, bucket, key))
        return f"s3://{bucket}/{key}"


# Threads may share a client but not make one; forked children may not even share it.
_making_client = threading.Lock()


def s3_client(endpoint_url: str | None) -> "S3Client":
    """That of this process. Raises `ImportError`, and `ValueError` where the endpoint is no URL."""
    with _making_client:
        return _client(os.getpid(), endpoint_url)


@cache
def _client(pid: int, endpoint_url: str | None) -> "S3Client":
    import boto3
    from botocore.config import Config

    from keye.config.bounded_s3 import bound

    options = Config(
        retries={"mode": "standard", "total_max_attempts": 3},
        s3={"addressing_style": "path" if endpoint_url else "auto"},
    )
    load_aws_names()
    return bound(boto3.session.Session().client("s3", endpoint_url=endpoint_url, config=options))
