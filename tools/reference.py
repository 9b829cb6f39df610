"""Writes docs/reference.md from the code: `python tools/reference.py`. A contract test keeps the page equal to it."""

from pathlib import Path
from typing import Literal, get_args, get_origin

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from keye.config import frame_times
from keye.config.codes import ErrorCode
from keye.config.settings import Settings
from keye.producer.shell import ExitCode

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference.md"


def reference() -> str:
    """The whole page."""
    settings = [
        [code(f"KEYE_{name.upper()}"), default(field), allowed(field), str(field.description)]
        for name, field in Settings.model_fields.items()
    ]
    codes = [
        [code(each.value), each.facts.blame, "yes" if each.facts.retryable else "no", each.facts.meaning]
        for each in ErrorCode
    ]
    exits = [[code(str(each.value)), each.meaning] for each in ExitCode]
    return f"""# Reference

Made from the code by `python tools/reference.py`; change it there.

## Settings

From the environment, a `.env` file in the working directory, or both; the environment wins. An empty value counts as
none.

{table("setting", "default", "allowed", "meaning", rows=settings)}

## Error codes

What `failure.code` of a job that ended without an answer may be. Which of them a worker tries again by itself stands in
[operations](operations.md#which-failures-are-tried-again).

{table("code", "whose fault", "trying again can help", "meaning", rows=codes)}

## Exit codes of `keye`

Those of `keye-worker` stand in [operations](operations.md#how-did-a-process-end).

{table("code", "meaning", rows=exits)}

## Times of frames

{frame_times.__doc__}"""


def table(*heads: str, rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [list(heads), ["---"] * len(heads), *rows])


def code(text: str) -> str:
    return f"`{text}`" if text else ""


def default(field: FieldInfo) -> str:
    """As it is written in the environment; nothing where it is empty, or made at start as the description tells."""
    match field.default:
        case SecretStr() as secret:
            return code(secret.get_secret_value())
        case bool() as flag:
            return code(str(flag).lower())
        case str() | int() | float() | Path() as value:
            return code(str(value))
        case _:
            return ""


def allowed(field: FieldInfo) -> str:
    """The words or numbers it may be, where not every one of its type."""
    if get_origin(field.annotation) is Literal:
        return ", ".join(map(code, get_args(field.annotation)))
    if field.annotation is bool:
        return "`true`, `false`"
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    bounds = [(sign, getattr(rule, name, None)) for rule in field.metadata for name, sign in signs.items()]
    return ", ".join(f"{sign} {bound}" for sign, bound in bounds if bound is not None)


if __name__ == "__main__":
    PAGE.write_text(reference())
