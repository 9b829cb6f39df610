"""Media on this machine's disks: opened where they lie, never copied."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from keye.config.outcome import ErrorCode
from keye.worker.media.fault import MediaFault
from keye.worker.media.fetch.guard import open_inside
from keye.worker.media.limits import check_size
from keye.worker.media.medium_name import name_medium


def open_local(uri: str, roots: Sequence[Path], max_bytes: int) -> BinaryIO:
    """Open an absolute path or a `file:` URI (RFC 8089: percent-encoded, on this host)."""
    name = name_medium(uri)
    file = open_inside(_path_of(uri, name), roots, name)
    try:
        check_size(os.fstat(file.fileno()).st_size, max_bytes, name)
    except MediaFault:
        file.close()
        raise
    return file


def _path_of(uri: str, name: str) -> str:
    if uri.startswith("/"):
        return uri
    url = urlsplit(uri)
    if url.netloc not in ("", "localhost") or not url.path.startswith("/"):
        raise MediaFault(ErrorCode.MEDIA_NOT_FOUND, f"{name}: is no file URI of this host. Write file:///folder/name.")
    return unquote(url.path)
