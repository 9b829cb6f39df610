"""What people read in a terminal: text that others wrote, without what a terminal obeys; and how a command ends that
nobody reads or waits for any more. Loads next to nothing, for probes. `keye.config.contract.escaped` is for what has to
stay in one line.
"""

import codecs
import os
import re
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn, TextIO, cast

# Exit codes of every command: EX_IOERR of sysexits.h, and 128 + signal as shells have it.
UNWRITABLE = 74
INTERRUPTED = 128 + signal.SIGINT
UNREAD = 128 + signal.SIGPIPE
TERMINATED = 128 + signal.SIGTERM

# What moves the cursor, clears, hides, rings or sets titles; turns text round; and halves of characters. Line breaks
# and tabs are text.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# Colours and the like, which our own styles are.
_STYLE = re.compile("(\x1b\\[[0-9;]{0,32}m)")
# Ask for styles where there is no terminal: of rich, of typer, and of GitHub, where typer takes it for one.
_STYLES_ASKED = ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS")
_WITHOUT_STYLES = ("dumb", "unknown")


def visible(text: str) -> str:
    r"""What a terminal would obey as `\u001b`, which is right in JSON too: there it stands within strings alone."""
    return _OBEYED.sub(lambda found: _written(found[0]), text)


def without_styles(text: str) -> str:
    return _STYLE.sub("", text)


def _written(char: str) -> str:
    units = char.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[at : at + 4]}" for at in range(0, len(units), 4))


def _write_out(fault: UnicodeError) -> tuple[str, int]:
    assert isinstance(fault, UnicodeEncodeError)
    return "".join(map(_written, fault.object[fault.start : fault.end])), fault.end


codecs.register_error("keye.visible", _write_out)


def has_styles(stream: "TextIO | OutputStream") -> bool:
    """Whether who reads it wants bold and colours: as typer has it, but that `NO_COLOR` wants none of either."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM", "").lower() in _WITHOUT_STYLES:
        return False
    return stream.isatty() or any(map(os.environ.get, _STYLES_ASKED))


class OutputStream:
    """Standard output or error: where it cannot be written to, the command ends, quietly where nobody reads it."""

    ends_at_faults = True

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        with self._ending_at_faults():
            return self.stream.write(text)

    def flush(self) -> None:
        with self._ending_at_faults():
            self.stream.flush()

    @contextmanager
    def _ending_at_faults(self) -> Iterator[None]:
        try:
            yield
        except OSError as fault:
            if not self.ends_at_faults:
                raise
            # Else Python would try once more as it ends, and say so.
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            if isinstance(fault, BrokenPipeError):
                raise SystemExit(UNREAD) from None
            print(
                f"The output cannot be written: {fault.strerror}. What was done is done; what it would say is lost.",
                file=sys.stderr,
            )
            raise SystemExit(UNWRITABLE) from None

    def __getattr__(self, name: str) -> Any:
        # By its bytes it could be gone around: click does where the terminal knows ASCII alone.
        if name in ("buffer", "detach"):
            raise AttributeError(name)
        return getattr(self.stream, name)


class GuardedStream(OutputStream):
    """One to which whatever is written is `visible`; a library's styles pass while `lets_styles_pass`, or are left out
    where nobody wants any.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self.lets_styles_pass = False
        # A terminal may know no more than ASCII.
        if callable(reconfigure := getattr(stream, "reconfigure", None)):
            reconfigure(errors="keye.visible")

    def write(self, text: str) -> int:
        parts = _STYLE.split(text) if self.lets_styles_pass else [text]
        style = str if has_styles(self) else without_styles
        super().write("".join(style(part) if number % 2 else visible(part) for number, part in enumerate(parts)))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)


def guard_terminal() -> None:
    """From here on all that this process prints is `visible`, Python's own words and those of libraries too."""
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            # The caller has closed it.
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), "r" if name == "stdin" else "w"))
        elif name != "stdin" and not isinstance(stream, GuardedStream):
            setattr(sys, name, cast(TextIO, GuardedStream(stream)))


def outlive_output() -> None:
    """For a daemon, which does not end with who reads what libraries print."""
    OutputStream.ends_at_faults = False


def let_styles_pass(do: bool) -> None:
    """Those of a library that tells of what is ours, in its own colours."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, GuardedStream):
            stream.lets_styles_pass = do


def unguarded(stream: TextIO) -> TextIO:
    """For text that is `visible`, with our own styles."""
    return cast(TextIO, OutputStream(stream.stream)) if isinstance(stream, GuardedStream) else stream


def end_at_ctrl_c() -> None:
    """From here on at once and without a word: for while modules load, and nothing has begun that is to be ended."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda number, _: os._exit(128 + number))


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """In the main thread Ctrl-C raises `KeyboardInterrupt`, SIGTERM `SystemExit`; both end in the codes of a shell."""
    wanted: dict[signal.Signals, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: _exit}
    try:
        # Whoever has one ignored, as `nohup` does, means it.
        heard = [number for number in wanted if signal.getsignal(number) is not signal.SIG_IGN]
        handlers = {number: signal.signal(number, wanted[number]) for number in heard}
    except ValueError:
        # Another thread's.
        handlers = {}
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _exit(number: int, _: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
