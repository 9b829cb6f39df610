"""The jobs of a batch that asks the same about everything in a folder, or below a prefix of a bucket."""

import os
from collections.abc import Iterator
from typing import Any

from keye.config.contract import escaped
from keye.config.faults import InvalidBatch, InvalidJob, install_command
from keye.config.formats import media_type_of
from keye.producer.batch.lines import Line, named
from keye.producer.batch.source import Position
from keye.producer.upload import s3_client


class _Listing:
    """Names in the order of their bytes, of which those are read that follow the last: what is added before it
    meanwhile is not.

    What is neither an image nor a video is no job; `num_passed_over` counts it.
    """

    num_passed_over = 0

    def __init__(self) -> None:
        self.position = Position()

    def go_to(self, position: Position) -> None:
        # What was listed is not listed again.
        self.position = position
        self.num_passed_over = position.num_passed_over

    def lines(self) -> Iterator[Line]:
        end, number, *_ = self.position
        for name in self._names(end or b""):
            if not self._is_medium(name):
                self.num_passed_over += 1
                continue
            number += 1
            self.position = Position(name, number, num_passed_over=self.num_passed_over)
            yield self.read(number, name)

    def read(self, number: int, start: Any) -> Line:
        try:
            # Not every file is called by text.
            custom_id = named(start.decode(errors="backslashreplace"))
            return Line(number, start, custom_id, {"media": [self._medium_of(start)]})
        except InvalidJob as fault:
            return Line(number, start, None, fault)

    def share(self) -> None:
        return None

    def close(self) -> None:
        pass

    def _names(self, last: Any) -> Iterator[bytes]:
        """Those behind it, in order. Raises `InvalidBatch`."""
        raise NotImplementedError

    def _is_medium(self, name: bytes) -> bool:
        raise NotImplementedError

    def _medium_of(self, name: bytes) -> Any:
        raise NotImplementedError


class Folder(_Listing):
    """Files of a folder and of those in it, but for hidden ones. They are sent; of an absolute path the paths are.

    Links to files are followed, those to folders are not: they may lead round in a circle.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = os.fsencode(path if os.path.isabs(path) else os.path.join(".", path))

    def _names(self, last: bytes) -> Iterator[bytes]:
        # The next one last. Folders end in a slash, so that what is in them is where their own name is.
        to_read = [b""]
        while to_read:
            name = to_read.pop()
            if name and not name.endswith(b"/"):
                yield name
                continue
            found = sorted(self._found_in(name), reverse=True)
            to_read += (each for each in found if each > last or (each.endswith(b"/") and last.startswith(each)))

    def _found_in(self, folder: bytes) -> Iterator[bytes]:
        path = os.path.join(self._path, folder)
        try:
            with os.scandir(path) as entries:
                for each in entries:
                    if each.name.startswith(b"."):
                        continue
                    if each.is_dir(follow_symlinks=False):
                        yield folder + each.name + b"/"
                    elif each.is_file(follow_symlinks=False) or os.path.isfile(each.path):
                        yield folder + each.name
                    else:
                        self.num_passed_over += 1
        except OSError as fault:
            # Another may be removed meanwhile.
            if not folder or not isinstance(fault, FileNotFoundError | NotADirectoryError):
                shown = escaped(os.fsdecode(path))
                raise InvalidBatch(
                    f"{shown} cannot be listed: {fault.strerror}. Begin this again once it can be."
                ) from None

    def _is_medium(self, name: bytes) -> bool:
        return media_type_of(os.path.abspath(self._medium_of(name))) is not None

    def _medium_of(self, name: bytes) -> str:
        return os.fsdecode(os.path.join(self._path, name))


class Prefix(_Listing):
    """Objects of a bucket whose keys begin with a prefix, in the order of their keys."""

    def __init__(self, uri: str, endpoint_url: str | None) -> None:
        super().__init__()
        self._bucket, _, self._prefix = uri[len("s3://") :].partition("/")
        self._endpoint_url = endpoint_url

    def _names(self, last: bytes) -> Iterator[bytes]:
        for key in self._keys(last):
            if key <= last:
                raise InvalidBatch(
                    f"s3://{escaped(self._bucket)} does not list its keys in the order of their bytes, as S3 does: "
                    "nobody could go on where this was. Give a file of lines that name its objects."
                )
            last = key
            yield key

    def _keys(self, last: bytes) -> Iterator[bytes]:
        try:
            from botocore.exceptions import BotoCoreError, ClientError
            from botocore.parsers import ResponseParserError

            from keye.config.bounded_s3 import code_of
        except ImportError:
            raise InvalidBatch(
                f"A bucket is listed by boto3, which is not installed: {install_command('upload')}"
            ) from None
        try:
            pages = s3_client(self._endpoint_url).get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self._bucket, Prefix=self._prefix, StartAfter=last.decode()):
                # What ends with a slash is a folder, as consoles show one.
                yield from (each["Key"].encode() for each in page.get("Contents", ()) if not each["Key"].endswith("/"))
        except (BotoCoreError, ClientError, ValueError, LookupError, TypeError, ResponseParserError) as error:
            # botocore takes what a server says for what S3 would say.
            fault = code_of(error) if isinstance(error, ClientError) else type(error).__name__
            raise InvalidBatch(
                f"s3://{escaped(self._bucket)}/{escaped(self._prefix)} cannot be listed: {fault}. Check the name, "
                "KEYE_S3_ENDPOINT_URL and the credentials, and begin this again: it goes on where it was."
            ) from None

    def _is_medium(self, name: bytes) -> bool:
        return self._type_of(name) is not None

    def _medium_of(self, name: bytes) -> dict[str, Any]:
        return {"type": self._type_of(name), "uri": f"s3://{self._bucket}/{name.decode()}"}

    def _type_of(self, name: bytes) -> str | None:
        # Elsewhere what follows a "?" is no part of the name.
        return media_type_of(f"s3://{name.decode().replace('?', '_')}")
