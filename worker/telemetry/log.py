"""The log of a process: a record a line on stderr, text or JSON, without secrets. Nobody waits for who reads it."""

import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from queue import SimpleQueue
from threading import Event, Thread
from types import MappingProxyType
from typing import Any

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

from keye.config.aws import load_aws_names
from keye.config.settings import Settings
from keye.config.terminal import visible
from keye.worker.telemetry.redaction import redaction
from keye.worker.telemetry.standard_streams import STDERR, Room, wait_for_no_reader

# A reader that pauses for seconds misses nothing; one that is gone costs no more than some megabytes.
MAX_WAITING_LINES = 5_000
# How long the end of a process waits for what is not written yet.
FLUSH_SECONDS = 2.0

_FACTS: ContextVar[Mapping[str, Any]] = ContextVar("facts", default=MappingProxyType({}))


@contextmanager
def about(**facts: Any) -> Iterator[None]:
    """Every record that this thread writes meanwhile, a library's too, has these fields, unless it has its own."""
    token = _FACTS.set({**_FACTS.get(), **facts})
    try:
        yield
    finally:
        _FACTS.reset(token)


class LogStream(logging.Handler):
    """Lines go through a bounded queue to one thread that writes them: where the disk is full, the pipe closed or its
    reader slow, they are dropped and counted, and whoever logs goes on.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._room = Room(descriptor)
        # Unlike others it may be put to by a signal handler that interrupts a put.
        self._lines: SimpleQueue[str | Event] = SimpleQueue()
        self._num_refused = 0
        self._num_unwritten = 0
        Thread(target=self._write, name="log", daemon=True).start()

    @property
    def num_dropped(self) -> int:
        return self._num_refused + self._num_unwritten

    def emit(self, record: logging.LogRecord) -> None:
        if self._lines.qsize() >= MAX_WAITING_LINES:
            self._num_refused += 1
            return
        for name, fact in _FACTS.get().items():
            record.__dict__.setdefault(name, fact)
        try:
            line = self.format(record)
        except Exception as fault:
            # Of what was to be told, which may be anything. Python's own word on it holds all of that, on many lines.
            where = (record.pathname, record.lineno, type(fault).__name__)
            told = {"name": record.name, "levelno": record.levelno, "levelname": record.levelname, **_FACTS.get()}
            line = self.format(logging.makeLogRecord(told | {"msg": "%s:%s logs what raises %s", "args": where}))
        self._lines.put(f"{line}\n")

    def flush(self) -> None:
        """Waits until what was logged before is written, but not for long."""
        is_written = Event()
        self._lines.put(is_written)
        is_written.wait(FLUSH_SECONDS)

    def _write(self) -> None:
        cut_off = b""
        while True:
            match self._lines.get():
                case str() as line:
                    whole = rest = cut_off + line.encode(errors="backslashreplace")
                    try:
                        while rest:
                            try:
                                rest = rest[os.write(self._descriptor, rest) :]
                            except BlockingIOError:
                                self._room.wait()
                        cut_off = b""
                    except OSError:
                        self._num_unwritten += 1
                        # What comes next does not go on where this one broke off.
                        cut_off = b"\n" if rest != whole else cut_off
                case asked:
                    asked.set()


class TextLines(logging.Formatter):
    def __init__(self, worker: str, redact: Callable[[str], str]) -> None:
        super().__init__(f"[%(asctime)s: %(levelname)s/{worker}] %(message)s")
        self._redact = redact

    def format(self, record: logging.LogRecord) -> str:
        # Where others have broken it, what follows does not begin like a line of ours.
        return visible(self._redact(super().format(record))).replace("\n[", "\n [")

    def formatMessage(self, record: logging.LogRecord) -> str:
        traceparent = getattr(record, "traceparent", None)
        return super().formatMessage(record) + (f" ({traceparent})" if traceparent else "")


class JsonLines(JsonFormatter):
    def __init__(self, worker: str, redact: Callable[[str], str]) -> None:
        names = {"levelname": "level", "name": "logger"}
        super().__init__(
            [*names, "message"],
            rename_fields=names,
            static_fields={"worker": worker},
            timestamp="time",
            # Celery's, which repeats what it says of a message.
            reserved_attrs=[*RESERVED_ATTRS, "data"],
        )
        self._redact = redact

    def process_log_record(self, log_data: dict[str, Any]) -> dict[str, Any]:
        return {"time": log_data.pop("time")} | {name: self._clean(value) for name, value in log_data.items()}

    def _clean(self, value: Any) -> Any:
        # What JSON has no number for is text.
        is_plain = (
            value is None or isinstance(value, int | datetime) or (isinstance(value, float) and math.isfinite(value))
        )
        return value if is_plain else self._redact(str(value))


def set_up_log(settings: Settings, worker: str, level: str | int, file: str | None = None) -> None:
    """From here on all that this process logs, and the fault that ends it. `level` is for where none is set.

    `worker` names the process in each line. Raises `OSError` where the file cannot be opened.
    """
    wait_for_no_reader()
    # Those of `.env` are secrets, too.
    load_aws_names()
    descriptor = STDERR if file is None else os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    stream = LogStream(descriptor)
    lines = JsonLines if settings.log_format == "json" else TextLines
    stream.setFormatter(lines(worker, redaction(settings)))
    root, ours = logging.getLogger(), logging.getLogger("keye")
    root.handlers = [stream]
    ours.setLevel(settings.log_level or level)
    # Below it, libraries tell of bodies and of signatures: prompts, and keys.
    root.setLevel(max(ours.level, logging.INFO))
    logging.captureWarnings(True)
    sys.excepthook = lambda *error: root.critical("A fault that nobody foresaw ends this process", exc_info=error)


def flush_log() -> None:
    for handler in logging.getLogger().handlers:
        handler.flush()


def dropped_lines() -> int:
    """How many lines of this process' log nobody could read."""
    return sum(each.num_dropped for each in logging.getLogger().handlers if isinstance(each, LogStream))
