"""What every `keye` command shares: its options, what it prints by, the connection, each error's exit code."""

import json
import os
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from typing import Annotated, Any, Self, TextIO, cast

import typer
from typer.core import TyperCommand, TyperGroup
from typer.models import CommandFunctionType

import keye
from keye.config import faults, terminal
from keye.config.contract import escaped
from keye.config.job import MAX_TEXT_BYTES
from keye.config.terminal import ended_by_signals, guard_terminal, has_styles, let_styles_pass, unguarded, visible
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
    UNWRITABLE = terminal.UNWRITABLE, "the output cannot be written", faults.OutputUnwritable
    INTERRUPTED = terminal.INTERRUPTED, "ended by Ctrl-C"
    UNREAD = terminal.UNREAD, "nobody reads the output any more"
    TERMINATED = terminal.TERMINATED, "ended by SIGTERM"

    @classmethod
    def of(cls, error: Exception) -> Self:
        return next((code for code in cls if isinstance(error, code.errors)), cls.INVALID)


def list_codes(codes: Iterable[Any]) -> str:
    """One a line, as typer reads an epilog."""
    return "\n".join(["Exit codes:", *(f"{code.value:>3} {code.meaning}" for code in codes)])


RedisUrl = Annotated[str | None, typer.Option(help="default: KEYE_REDIS_URL, from the environment or .env")]
Also = Annotated[
    list[str] | None, typer.Option("--also", metavar="QUESTION", help="another question about the same media")
]
SchemaFile = Annotated[
    typer.FileBinaryRead | None,
    typer.Option("--schema", metavar="FILE", help="what the answer has to fit: a JSON Schema, or a list of choices"),
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]


def tell(text: str, err: bool = False, end: str = "\n", is_styled: bool = False, hang: int | None = None) -> None:
    """All that a command prints, JSON too, to standard output or error: nothing in it that a terminal obeys.

    Of a text that `is_styled` styles are left, for who has any; what others wrote in it has to be `visible` already.
    A line longer than a terminal goes on between words, `hang` columns in: an error, and where `hang` is given.
    """
    stream = sys.stderr if err else sys.stdout
    if is_styled and has_styles(stream):
        print(text, file=unguarded(stream), end=end, flush=True)
        return
    text = visible(terminal.without_styles(text) if is_styled else text)
    if (err or hang is not None) and end == "\n" and stream.isatty():
        text = folded(text, width_of(stream), hang or 0)
    print(text, file=stream, end=end, flush=True)


def folded(text: str, width: int, hang: int) -> str:
    """Broken between words alone: what has none, an id say, can still be taken up whole."""
    wrapper = textwrap.TextWrapper(
        width,
        subsequent_indent=" " * hang,
        break_long_words=False,
        break_on_hyphens=False,
        expand_tabs=False,
        replace_whitespace=False,
    )
    return "\n".join("\n".join(wrapper.wrap(line)) for line in text.split("\n"))


def width_of(stream: TextIO) -> int:
    """Of a terminal, in columns, as rich has it."""
    asked = os.environ.get("COLUMNS", "")
    return int(asked if asked.isdecimal() else 0) or os.get_terminal_size(stream.fileno()).columns or 80


def read_prompt() -> str:
    """From standard input, without the line break at its end. Raises `InvalidJob`."""
    if sys.stdin.isatty():
        tell("Reading the prompt until Ctrl-D.", err=True)
    # With its line break, and one more.
    read = sys.stdin.buffer.read(MAX_TEXT_BYTES + 3)
    if len(read) == MAX_TEXT_BYTES + 3:
        raise faults.InvalidJob(f"1 fault: prompt: standard input has more than {MAX_TEXT_BYTES} bytes, the limit.")
    try:
        text = read.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        raise faults.InvalidJob(
            f"1 fault: prompt: standard input is no UTF-8 from byte {fault.start + 1} on. Send text in UTF-8."
        ) from None
    text = text.removesuffix("\n").removesuffix("\r")
    if not text:
        raise faults.InvalidJob("1 fault: prompt: standard input is empty. Send the question there, or give it here.")
    return text


def asked_of(prompt: str | None, also: Sequence[str] | None) -> dict[str, Any]:
    """As fields of a job: the question, - for standard input, or several."""
    prompt = read_prompt() if prompt == "-" else prompt
    return {"questions": [prompt, *also]} if also else {"prompt": prompt}


def read_schema(file: typer.FileBinaryRead | None) -> Any:
    """Raises `InvalidJob` where it is no JSON."""
    if file is None:
        return None
    try:
        if (schema := json.loads(file.read())) is None:
            raise ValueError("it is null")
    except (ValueError, RecursionError) as fault:
        raise faults.InvalidJob(f"1 fault: response_schema: --schema is no JSON ({escaped(str(fault))})") from None
    return schema


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


# What is left of 80 columns. In fewer, boxes of help leave no room for the names of options.
_HELP_COLUMNS = 78


class _Command(TyperCommand):
    """A command of ours, which prints in no colours but by `tell` and `OurConsole`."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        if formatter.width < _HELP_COLUMNS:
            super(TyperCommand, self).format_help(ctx, formatter)
        else:
            super().format_help(ctx, formatter)

    def invoke(self, ctx: Any) -> Any:
        let_styles_pass(False)
        with _telling_visibly():
            return super().invoke(ctx)


class _Commands(TyperGroup):
    """Also what typer and Python print, of wrong arguments say, is nothing that a terminal obeys but typer's styles."""

    def main(self, *args: Any, **options: Any) -> Any:
        with ended_by_signals():
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

    def __init__(self, name: str, **options: Any) -> None:
        """`name` is the program's, whose help lists the exit codes."""
        super().__init__(cls=_Commands, no_args_is_help=True, **options)
        self._pointer = f"Exit codes: see {name} --help"

    def command(self, *args: Any, **options: Any) -> "Callable[[CommandFunctionType], CommandFunctionType]":
        return super().command(*args, cls=_Command, epilog=self._pointer, **options)


def command_line(name: str, what: str, epilog: str) -> CommandLine:
    """A command of commands, which tells its version and, by -h too, its use."""
    return CommandLine(
        name,
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
def telling_how_to_go_on(job_id: str, what: str = "goes on", *errors: type[Exception]) -> Iterator[None]:
    """Who ends the wait for a job by a signal hears its id and what may be done about it; of these `errors`, too."""
    try:
        yield
    except BaseException as end:
        is_terminated = isinstance(end, SystemExit) and end.code == ExitCode.TERMINATED
        if is_terminated or isinstance(end, (KeyboardInterrupt, *errors)):
            verbs = ", ".join(f"keye {verb} {job_id}" for verb in ("watch", "result", "cancel"))
            tell(escaped(f"Job {job_id} {what}: {verbs}"), err=True)
        raise


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
