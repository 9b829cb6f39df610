"""How our processes end. Codes stay for ever: service managers and alerts are configured with them."""

from enum import IntEnum
from typing import Self


class ExitCode(IntEnum):
    """1 is left to uncaught faults and 2 to wrong command lines, as Python and typer use them."""

    meaning: str

    def __new__(cls, value: int, meaning: str = "") -> Self:
        code = int.__new__(cls, value)
        code._value_, code.meaning = value, meaning
        return code

    OK = 0, "Ended as asked; every running job was finished or given back."
    PREFLIGHT_FAILED = 10, "A check before starting found faults; all of them are in the message."
    WRONG_POOL = 11, "Celery was started with a pool other than threads."
    MODEL_LOAD_FAILED = 12, "The checkpoint could not be loaded, or what it computes here is wrong or fails."
    ENGINE_DIED = (
        13,
        "The engine's thread ended, as with a lost device; its jobs are given back, a fresh process starts.",
    )
    CHILD_NEVER_READY = 14, "Every worker died five times in a row before it was ready; the supervisor gave up."
    DRAIN_INCOMPLETE = 15, "A worker hung 10 s beyond KEYE_DRAIN_SECONDS, or died; others take its jobs up."
    FORCED = 16, "A second SIGTERM or SIGINT cut the drain short; other workers take the running jobs up."
    STEP_HUNG = 17, "A step of the engine outlasted KEYE_STEP_SECONDS; the supervisor starts a fresh process."
    JOB_HUNG = 18, "A job hung in its thread beyond its time; it was ended, its neighbours finished or given back."


def describe(returncode: int) -> str:
    """A process's return code in words; negative means killed by that signal, as `subprocess` says it."""
    if returncode < 0:
        return f"killed by signal {-returncode}"
    name = f" ({ExitCode(returncode).name})" if returncode in set(ExitCode) else ""
    return f"exit code {returncode}{name}"
