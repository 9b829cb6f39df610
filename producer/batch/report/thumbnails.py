"""Small pictures of the media that jobs ask about, for a page: each is made by a process of its own, within limits.

What is at https is not fetched: a page about a batch asks no strangers.
"""

import os
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from contextlib import ExitStack
from importlib.util import find_spec
from io import FileIO
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import unquote_to_bytes, urlsplit

from keye.config.faults import install_command
from keye.config.formats import format_of_file, read_inline
from keye.config.medium_name import name_medium
from keye.producer.batch.report.thumbnail_child import CPU_SECONDS, TOO_LARGE
from keye.producer.medium import is_uri, open_at_once
from keye.producer.upload import s3_client

# Of each: pixels of its longer side, and bytes.
SIDE, MAX_BYTES = 160, 9_000
# Of an object of a bucket; a longer video is shown by its beginning.
MAX_OBJECT_BYTES = 16 * 2**20
# For one medium, and for all.
MEDIUM_SECONDS, ALL_SECONDS = CPU_SECONDS / 2, 45.0

_CHILD = Path(__file__).with_name("thumbnail_child.py")
# It needs no secret.
_ENVIRON = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "LANG")
_MANY = 8
_LATE = "there was no time left for it"


class Thumbnail(NamedTuple):
    """`jpeg` is empty where there is none, and `why` says why."""

    name: str
    jpeg: bytes = b""
    why: str = ""


class _NoThumbnail(Exception):
    pass


class Thumbnails:
    """Makes them side by side, for `ALL_SECONDS` from now on; `lacks` are what would have given more of them."""

    def __init__(self, endpoint_url: str | None) -> None:
        self.lacks: set[str] = set()
        self._endpoint_url = endpoint_url
        self._ends_at = time.monotonic() + ALL_SECONDS
        self._threads = ThreadPoolExecutor(min(_MANY, os.cpu_count() or 1), "keye-thumbnails")

    def of(self, uris: Iterable[str]) -> list[Thumbnail]:
        made = [(name_medium(uri), self._threads.submit(self._try, uri)) for uri in uris]
        thumbnails = []
        for name, future in made:
            try:
                jpeg, why = future.result(max(0.0, self._ends_at - time.monotonic()))
            except NotYet:
                jpeg, why = b"", _LATE
            thumbnails.append(Thumbnail(name, jpeg, why))
        return thumbnails

    def close(self) -> None:
        # A store that does not answer is not waited for.
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _try(self, uri: str) -> tuple[bytes, str]:
        try:
            return self._make(uri), ""
        except _NoThumbnail as why:
            return b"", str(why)
        except (OSError, ValueError, RuntimeError) as fault:
            # The last where this process may start no more threads.
            return b"", (isinstance(fault, OSError) and fault.strerror) or "it cannot be read"

    def _make(self, uri: str) -> bytes:
        scheme = uri.partition(":")[0].lower() if is_uri(uri) else ""
        if scheme == "https":
            raise _NoThumbnail("what is on the web is not fetched")
        with ExitStack() as opened:
            if scheme == "s3":
                file = _held(self._fetch(uri))
            elif scheme == "data":
                file = _held(read_inline(uri))
            else:
                path = os.fsdecode(unquote_to_bytes(urlsplit(uri).path)) if scheme == "file" else uri
                file = open(path, "rb", 0, opener=open_at_once)  # noqa: SIM115
            opened.enter_context(file)
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise _NoThumbnail("it is a pipe or a device")
            return self._decode(file)

    def _fetch(self, uri: str) -> bytes:
        bucket, _, key = uri[len("s3://") :].partition("/")
        key, _, version = key.partition("?versionId=")
        try:
            from botocore.exceptions import ClientError

            from keye.config.bounded_s3 import code_of, watched_by
        except ImportError:
            raise self._lack("boto3", "upload") from None
        try:
            with watched_by(self._go_on):
                answer = s3_client(self._endpoint_url).get_object(
                    Bucket=bucket,
                    Key=key,
                    Range=f"bytes=0-{MAX_OBJECT_BYTES - 1}",
                    **({"VersionId": version} if version else {}),  # type: ignore[arg-type]
                )
                with answer["Body"] as body:
                    return body.read(MAX_OBJECT_BYTES)
        except _NoThumbnail:
            raise
        except ClientError as error:
            raise _NoThumbnail(f"the store says {code_of(error)}") from None
        except Exception as error:
            # botocore takes what a server says for what S3 would say.
            raise _NoThumbnail(f"the store cannot be read: {type(error).__name__}") from None

    def _decode(self, file: FileIO) -> bytes:
        found = format_of_file(file)
        if found.media_type is None:
            raise _NoThumbnail(f"it looks like {found.name}")
        if not find_spec("resource"):
            raise _NoThumbnail("what decodes it cannot be confined on this system")
        if not find_spec("PIL"):
            raise self._lack("Pillow", "upload")
        if found.media_type == "video" and not find_spec("av"):
            raise self._lack("PyAV", "worker")
        if found.name == "HEIF" and not find_spec("pillow_heif"):
            raise self._lack("pillow-heif", "heic")
        self._go_on()
        read_as = found.name if found.media_type == "image" else found.demuxer
        command = [sys.executable, "-P", str(_CHILD), found.media_type, str(read_as), str(SIDE), str(MAX_BYTES)]
        seconds = min(MEDIUM_SECONDS, self._ends_at - time.monotonic())
        environ = {name: os.environ[name] for name in _ENVIRON if name in os.environ}
        is_late = threading.Event()
        with subprocess.Popen(
            command, stdin=file, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environ
        ) as child:
            timer = threading.Timer(seconds, _end, (child.kill, is_late))
            timer.start()
            assert child.stdout is not None
            jpeg = child.stdout.read(MAX_BYTES + 1)
            child.stdout.close()
            child.wait()
            timer.cancel()
        if is_late.is_set():
            raise _NoThumbnail(f"it takes longer than {seconds:.0f} s to decode")
        if child.returncode == TOO_LARGE:
            raise _NoThumbnail("it is too large")
        if child.returncode or len(jpeg) > MAX_BYTES or not jpeg.startswith(b"\xff\xd8\xff"):
            is_start = os.fstat(file.fileno()).st_size == MAX_OBJECT_BYTES
            or_longer = f", or has more than {MAX_OBJECT_BYTES:,} bytes" if is_start else ""
            raise _NoThumbnail(f"it is damaged or cut off{or_longer}")
        return jpeg

    def _lack(self, package: str, extra: Literal["worker", "upload", "heic"]) -> _NoThumbnail:
        self.lacks.add(f"{package}: {install_command(extra)}")
        return _NoThumbnail(f"{package} is not installed here")

    def _go_on(self) -> None:
        if time.monotonic() > self._ends_at:
            raise _NoThumbnail(_LATE)


def _end(kill: Callable[[], None], is_late: threading.Event) -> None:
    is_late.set()
    kill()


def _held(content: bytes) -> FileIO:
    """A file, without a name, that a process can be given."""
    file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
    file.write(content)
    file.seek(0)
    return file
