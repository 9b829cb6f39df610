"""What every `keye` command shares: its options, the connection, each error's exit code, what a terminal may get."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Annotated

import typer

import keye
from keye.config.faults import (
    DeadLetterNotFound,
    IdempotencyConflict,
    JobFailed,
    JobNotEnded,
    JobNotFound,
    KeyeError,
    MessageNotFound,
    QueueUnavailable,
)
from keye.producer.client import Client


class ExitCode(IntEnum):
    OK = 0
    INVALID = 2  # also what typer exits with for wrong arguments
    JOB_FAILED = 3
    NOT_ENDED = 4
    NOT_FOUND = 5
    CONFLICT = 6
    UNAVAILABLE = 7
    TOO_LATE = 8
    IRREGULAR = 9


EXIT_CODES = (
    "Exit codes: 0 done; 2 wrong arguments or an invalid job; 3 the job ended without an answer; 4 it had not ended "
    "in time; 5 no such job or message; 6 the idempotency key belongs to another job; 7 Redis is unavailable; "
    "8 too late to cancel, the job had ended; 9 a job is in no legal state."
)

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
    except (KeyeError, ValueError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(exit_code_of(error)) from None


def exit_code_of(error: Exception) -> ExitCode:
    match error:
        case JobFailed():
            return ExitCode.JOB_FAILED
        case JobNotEnded():
            return ExitCode.NOT_ENDED
        case JobNotFound() | DeadLetterNotFound() | MessageNotFound():
            return ExitCode.NOT_FOUND
        case IdempotencyConflict():
            return ExitCode.CONFLICT
        case QueueUnavailable():
            return ExitCode.UNAVAILABLE
        case _:
            return ExitCode.INVALID
