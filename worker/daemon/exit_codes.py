"""How our processes end. Codes stay for ever: service managers and alerts are configured with them."""

from enum import IntEnum


class ExitCode(IntEnum):
    """1 is left to uncaught faults and 2 to wrong command lines, as Python and typer use them."""

    OK = 0
    PREFLIGHT_FAILED = 10
    WRONG_POOL = 11
    MODEL_LOAD_FAILED = 12
    ENGINE_DIED = 13
    CHILD_NEVER_READY = 14
    DRAIN_INCOMPLETE = 15
    FORCED = 16
    STEP_HUNG = 17
    JOB_HUNG = 18

    @property
    def meaning(self) -> str:
        return _MEANINGS[self]


_MEANINGS = {
    ExitCode.OK: "Ended as asked; every running job was finished or given back.",
    ExitCode.PREFLIGHT_FAILED: "A check before starting found faults; all of them are in the message.",
    ExitCode.WRONG_POOL: "Celery was started with a pool other than threads.",
    ExitCode.MODEL_LOAD_FAILED: "The checkpoint could not be loaded, or the warm-up generation failed.",
    ExitCode.ENGINE_DIED: "The engine's thread ended by a fault; the supervisor starts a fresh process.",
    ExitCode.CHILD_NEVER_READY: "A child died five times in a row before it was ready; the supervisor gave up.",
    ExitCode.DRAIN_INCOMPLETE: "A worker hung 10 s beyond KEYE_DRAIN_SECONDS, or died; others take its jobs up.",
    ExitCode.FORCED: "A second SIGTERM or SIGINT cut the drain short; other workers take the running jobs up.",
    ExitCode.STEP_HUNG: "A step of the engine outlasted KEYE_STEP_SECONDS; the supervisor starts a fresh process.",
    ExitCode.JOB_HUNG: "A job hung in its thread beyond its time; it was ended, its neighbours finished or given back.",
}


def describe(returncode: int) -> str:
    """A process's return code in words; negative means killed by that signal, as `subprocess` says it."""
    if returncode < 0:
        return f"killed by signal {-returncode}"
    if returncode in set(ExitCode):
        return f"exit code {returncode} ({ExitCode(returncode).name})"
    return f"exit code {returncode}"
