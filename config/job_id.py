"""What may be a job's id: it stands in keys, log lines, URLs and shells, and producers of all kinds choose it."""

import re
from typing import Annotated, Any, TypeGuard

from pydantic import AfterValidator, StringConstraints

PATTERN = r"^[A-Za-z0-9._:-]{1,128}$"
RULE = "1 to 128 letters, digits, dots, colons, hyphens and underscores, and not :events at its end"
# The stream of a job's events has this behind the key of its record.
_RESERVED = ":events"


def is_job_id(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and re.fullmatch(PATTERN, value) is not None and not value.endswith(_RESERVED)


def _not_reserved(job_id: str) -> str:
    if job_id.endswith(_RESERVED):
        raise ValueError(f"{_RESERVED} at the end of an id is taken")
    return job_id


JobId = Annotated[str, StringConstraints(pattern=PATTERN), AfterValidator(_not_reserved)]
