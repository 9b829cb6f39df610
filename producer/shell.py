"""What every `keye` command shares: its options, what it prints by, the connection, each error's exit code."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Annotated, Any, Self, cast

import typer
from typer.core import TyperCommand, TyperGroup
from typer.models import CommandFunctionType

import keye
from keye.config import faults
from keye.config.contract import escaped
from keye.config.terminal import guard_terminal, let_styles_pass, unguarded, visible, without_styles
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
    DIFFERENT = 11, "the replayed job came to something else"

    @classmethod
    def of(cls, error: Exception) -> Self:
        return next((code for code in cls if isinstance(error, code.errors)), cls.INVALID)


EXIT_CODES = f"Exit codes: {'; '.join(f'{code.value} {code.meaning}' for code in ExitCode)}."

RedisUrl = Annotated[str | None, typer.Option(help="default: KEYE_REDIS_URL, from the environment or .env")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]


def tell(text: str, err: bool = False, end: str = "\n", is_styled: bool = False) -> None:
    """All that a command prints, JSON too, to standard output or error: nothing in it that a terminal obeys.

    Of a text that `is_styled` styles are left, for terminals; what others wrote in it has to be `visible` already.
    """
    stream = sys.stderr if err else sys.stdout
    if is_styled and stream.isatty():
        print(text, file=unguarded(stream), end=end, flush=True)
    else:
        print(visible(without_styles(text) if is_styled else text), file=stream, end=end, flush=True)


def confirmed(question: str, is_sure: bool) -> bool:
    """Whether to do what cannot be undone: `is_sure` (`--yes`), or whoever is at the terminal says so; else nobody can
    be asked, and the command ends with INVALID.
    """
    if is_sure:
        return True
    if not sys.stdin.isatty():
        tell(f"{question} Standard input is no terminal to ask at: say --yes.", err=True)
        raise typer.Exit(ExitCode.INVALID)
    tell(f"{question} [y/N] ", err=True, end="")
    return sys.stdin.readline().strip().lower() in ("y", "yes")


# What typer tells of before it exits: click's ClickException, wherever typer's release has it from.
_TOLD = cast(type[Exception], typer.BadParameter.__mro__[2])


class _Command(TyperCommand):
    """A command of ours, which prints in no colours but by `tell` and `OurConsole`."""

    def invoke(self, ctx: Any) -> Any:
        let_styles_pass(False)
        with _telling_visibly():
            return super().invoke(ctx)


class _Commands(TyperGroup):
    """Also what typer and Python print, of wrong arguments say, is nothing that a terminal obeys but typer's styles."""

    def main(self, *args: Any, **options: Any) -> Any:
        guard_terminal()
        let_styles_pass(True)
        return super().main(*args, **options)

    def make_context(self, *args: Any, **options: Any) -> Any:
        with _telling_visibly():
            return super().make_context(*args, **options)

    def invoke(self, ctx: Any) -> Any:
        with _telling_visibly():
            return super().invoke(ctx)


@contextmanager
def _telling_visibly() -> Iterator[None]:
    try:
        yield
    except _TOLD as fault:
        told: Any = fault
        told.message = visible(told.message)
        let_styles_pass(True)
        raise


class CommandLine(typer.Typer):
    """Commands of which nothing that others wrote reaches a terminal as it is, however they print it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(cls=_Commands, **options)

    def command(self, *args: Any, **options: Any) -> "Callable[[CommandFunctionType], CommandFunctionType]":
        return super().command(*args, cls=_Command, **options)


def command_line(what: str, epilog: str | None = None) -> CommandLine:
    """A command of commands, which tells its version and, by -h too, its use."""
    return CommandLine(
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
        tell(f"keye-worker {keye.__version__}")
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
        tell(escaped(str(error)), err=True)
        raise typer.Exit(ExitCode.of(error)) from None
