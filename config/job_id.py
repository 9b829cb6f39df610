"""What may be a job's id: it stands in keys, log lines, URLs and shells, and producers of all kinds choose it."""

import re
from typing import Annotated, Any, TypeGuard

from pydantic import AfterValidator

RULE = "1 to 128 letters, digits, dots, colons, hyphens and underscores, and not :events at its end"
# The stream of a job's events has this behind the key of its record.
_RESERVED = ":events"


def is_job_id(value: Any) -> TypeGuard[str]:
    if not isinstance(value, str) or value.endswith(_RESERVED):
        return False
    return re.fullmatch(r"[A-Za-z0-9._:-]{1,128}", value) is not None


def _of_the_kind(job_id: str) -> str:
    if not is_job_id(job_id):
        raise ValueError(f"an id is {RULE}")
    return job_id


# No pattern for pydantic: as part of the schema it would count as growth, which it is not.
JobId = Annotated[str, AfterValidator(_of_the_kind)]
