"""What every `keye` command shares: its options, the connection, each error's exit code."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Annotated, Self

import typer

import keye
from keye.config import faults
from keye.producer.client import Client


class ExitCode(IntEnum):
    """How a command ends: the number, what it means, and the errors that end it so. All others are INVALID."""

    meaning: str
    errors: tuple[type[Exception], ...]

    def __new__(cls, value: int, meaning: str, *errors: type[Exception]) -> Self:
        code = int.__new__(cls, value)
        code._value_, code.meaning, code.errors = value, meaning, errors
        return code

    OK = 0, "done"
    INVALID = 2, "wrong arguments or an invalid job"  # also what typer exits with for wrong arguments
    JOB_FAILED = 3, "the job ended without an answer", faults.JobFailed
    NOT_ENDED = 4, "it had not ended in time", faults.JobNotEnded
    NOT_FOUND = 5, "no such job or message", faults.JobNotFound, faults.DeadLetterNotFound, faults.MessageNotFound
    CONFLICT = 6, "the idempotency key belongs to another job", faults.IdempotencyConflict
    UNAVAILABLE = 7, "Redis is unavailable", faults.QueueUnavailable
    TOO_LATE = 8, "too late to cancel, the job had ended"
    IRREGULAR = 9, "a job is in no legal state"
    FULL = 10, "the queue is full", faults.QueueFull

    @classmethod
    def of(cls, error: Exception) -> Self:
        return next((code for code in cls if isinstance(error, code.errors)), cls.INVALID)


EXIT_CODES = f"Exit codes: {'; '.join(f'{code.value} {code.meaning}' for code in ExitCode)}."

RedisUrl = Annotated[str | None, typer.Option(help="default: KEYE_REDIS_URL, from the environment or .env")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]


def command_line(what: str, epilog: str | None = None) -> typer.Typer:
    """A command of commands, which tells its version and, by -h too, its use."""
    return typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        help=what,
        epilog=epilog,
        callback=_version,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"keye-worker {keye.__version__}")
        raise typer.Exit


def _version(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


@contextmanager
def connected(redis_url: str | None) -> Iterator[Client]:
    """A client for one command; every typed error becomes one line on standard error and an exit code."""
    try:
        with Client(redis_url) as client:
            yield client
    # ValueError: a record that somebody else has written into.
    except (faults.KeyeError, ValueError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(ExitCode.of(error)) from None
