"""How a medium is called in messages: short, and without what may be secret."""

import re
from urllib.parse import urlsplit

_MAX_LENGTH = 160
_INLINE_TYPE = re.compile(r"data:([\w.+-]{1,40}/[\w.+-]{1,40})?", re.IGNORECASE)


def name_medium(uri: str) -> str:
    """The reference without query, credentials or inline bytes: signed URLs carry their secrets there."""
    if inline := _INLINE_TYPE.match(uri):
        return f"inline {inline[1] or 'data'}"
    if uri[:6].lower() == "https:":
        url = urlsplit(uri)
        uri = f"https://{url.netloc.rpartition('@')[2]}{url.path}"
    elif uri[:3].lower() == "s3:":
        uri = uri.partition("?")[0]
    return uri if len(uri) <= _MAX_LENGTH else f"{uri[: _MAX_LENGTH // 2]}...{uri[-_MAX_LENGTH // 2 :]}"
