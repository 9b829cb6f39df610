"""Media that travel inside the job, as `data:` URIs (RFC 2397). Meant for small ones."""

import binascii
import os
from typing import BinaryIO
from urllib.parse import unquote_to_bytes

from keye.config.job import MAX_INLINE_BYTES
from keye.config.outcome import ErrorCode
from keye.worker.media.fault import MediaFault
from keye.worker.media.limits import check_size
from keye.worker.media.medium_name import name_medium


def open_inline(uri: str, max_bytes: int) -> BinaryIO:
    name = name_medium(uri)
    head, comma, payload = uri.partition(",")
    if not comma:
        raise MediaFault(ErrorCode.MEDIA_CORRUPT, f"{name}: has no comma between its type and its bytes.")
    try:
        content = unquote_to_bytes(payload)
        if head.lower().endswith(";base64"):
            content = binascii.a2b_base64(content, strict_mode=True)
    except (binascii.Error, UnicodeEncodeError):
        raise MediaFault(ErrorCode.MEDIA_CORRUPT, f"{name}: its bytes are not valid base64.") from None
    check_size(len(content), min(max_bytes, MAX_INLINE_BYTES), name)
    file = os.fdopen(os.memfd_create("keye-inline", os.MFD_CLOEXEC), "w+b")
    file.write(content)
    file.seek(0)
    return file
