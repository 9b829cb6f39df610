"""What an answer says that fits a schema."""

import json
import sys
from typing import Any

from keye.config.codes import ErrorCode
from keye.config.faults import Fault
from keye.config.response_schema import ResponseSchema, levels_of

# What reads an outcome gives up at a few hundred levels; pydantic at 255.
MAX_LEVELS = 100


def parse_answer(schema: ResponseSchema, answer: str) -> Any:
    """What the JSON says, or the text itself that fits a regular expression or is one of the choices.

    A number beyond what a float holds is the largest one. Raises `Fault` for what is nested too deeply to be stored.
    """
    if not isinstance(schema, dict):
        return answer
    try:
        parsed = json.loads(answer, parse_int=_parse_int, parse_float=_parse_float)
    except RecursionError:
        parsed = None
        levels: int | float = float("inf")
    else:
        levels = levels_of(parsed)
    if levels > MAX_LEVELS:
        message = f"The answer nests objects and arrays more than {MAX_LEVELS} levels deep."
        raise Fault(ErrorCode.ANSWER_INCOMPLETE, f"{message} Bound how deeply response_schema lets them nest.")
    return parsed


def _parse_int(digits: str) -> int | float:
    # More digits Python reads from no text, here and where the outcome is read.
    return int(digits) if len(digits) <= sys.int_info.default_max_str_digits else _parse_float(digits)


def _parse_float(digits: str) -> float:
    return min(max(float(digits), -sys.float_info.max), sys.float_info.max)
