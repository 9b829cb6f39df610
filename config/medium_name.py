"""What a medium is called for people: in sentences about it, in logs, on pages."""

import re

_MAX_LENGTH = 160
_INLINE_TYPE = re.compile(r"data:([\w.+-]{1,40}/[\w.+-]{1,40})?", re.IGNORECASE)
_WEB = re.compile(r"https:/*(?:[^/?#]*@)?([^?#]*)", re.IGNORECASE)


def name_medium(uri: str) -> str:
    """The reference without query, credentials or inline bytes: signed URLs carry their secrets there."""
    if inline := _INLINE_TYPE.match(uri):
        return f"inline {inline[1] or 'data'}"
    if web := _WEB.match(uri):
        uri = f"https://{web[1]}"
    elif uri[:3].lower() == "s3:":
        uri = uri.partition("?")[0]
    return uri if len(uri) <= _MAX_LENGTH else f"{uri[: _MAX_LENGTH // 2]}...{uri[-_MAX_LENGTH // 2 :]}"
