"""What people read in a terminal: text that others wrote, without what a terminal obeys. Loads next to nothing, for
probes. `keye.config.contract.escaped` is for what has to stay in one line.
"""

import codecs
import os
import re
import sys
from collections.abc import Iterable
from typing import Any, TextIO, cast

# What moves the cursor, clears, hides, rings or sets titles; turns text round; and halves of characters. Line breaks
# and tabs are text.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# Colours and the like, which our own styles are.
_STYLE = re.compile("(\x1b\\[[0-9;]{0,32}m)")
# Ask for styles where there is no terminal: of rich, of typer, and of GitHub, where typer takes it for one.
_STYLES_ASKED = ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS")


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


class GuardedStream:
    """A stream to which whatever is written is `visible`; a library's styles pass while `lets_styles_pass`."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.lets_styles_pass = False
        # A terminal may know no more than ASCII.
        if callable(reconfigure := getattr(stream, "reconfigure", None)):
            reconfigure(errors="keye.visible")

    def write(self, text: str) -> int:
        parts = _STYLE.split(text) if self.lets_styles_pass else [text]
        self.stream.write("".join(part if number % 2 else visible(part) for number, part in enumerate(parts)))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        # By its bytes it could be gone around: click does where the terminal knows ASCII alone.
        if name in ("buffer", "detach"):
            raise AttributeError(name)
        return getattr(self.stream, name)


def guard_terminal() -> None:
    """From here on all that this process prints is `visible`, Python's own words and those of libraries too."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, GuardedStream):
            setattr(sys, name, cast(TextIO, GuardedStream(stream)))


def let_styles_pass(do: bool) -> None:
    """Those of a library that tells of what is ours, in its own colours; where somebody sees them."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, GuardedStream):
            stream.lets_styles_pass = do and (stream.isatty() or any(map(os.environ.get, _STYLES_ASKED)))


def unguarded(stream: TextIO) -> TextIO:
    """For text that is `visible`, with our own styles."""
    return stream.stream if isinstance(stream, GuardedStream) else stream
