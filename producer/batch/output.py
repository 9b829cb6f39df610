"""A file that lines are added to, each on the disk before anybody counts on it."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

from keye.config.contract import escaped
from keye.config.faults import InvalidBatch, OutputUnwritable
from keye.producer.batch.written import ONCE_IT_CAN, Written


class Output:
    """It is made with its first line. Raises `OutputUnwritable` where it cannot be written."""

    def __init__(self, path: Path, written: Written) -> None:
        """So much of it is known. Raises `InvalidBatch` where that is not there any more."""
        self.path = path
        self.written = written
        self._file: FileIO | None = None
        found = Written()
        with self._telling():
            if path.exists():
                with path.open("rb") as file:
                    found = Written.read(file, written.size)
        if found != written:
            raise InvalidBatch(
                f"{escaped(str(path))} is not what it was: of the {written.size:,} bytes that were written some are "
                "gone or have changed. Put it back as it was, or begin another batch: with another output."
            )

    def recover(self, take: Callable[[dict[str, Any]], bool | None]) -> None:
        """Whoever wrote it last may have died before that was known. A line that `take` says yes to is kept, and what
        follows the last is cut. Raises `InvalidBatch` for one of which it knows nothing, None.
        """
        if self.path.exists():
            with self._telling(), self.path.open("r+b") as file:
                file.seek(self.written.size)
                for text in file:
                    if not text.endswith(b"\n") or (line := _read(text)) is None:
                        break
                    if (is_to_be_kept := take(line)) is None:
                        raise InvalidBatch(
                            f"{escaped(str(self.path))} is not what it was: behind the {self.written.size:,} bytes "
                            "that are known there is a line which this batch has not written. Take it out, or begin "
                            "another batch: with another output."
                        )
                    if not is_to_be_kept:
                        break
                    self.written = self.written.and_then(text)
                file.truncate(self.written.size)
                os.fsync(file.fileno())

    def add(self, lines: Iterable[str]) -> None:
        text = "".join(f"{line}\n" for line in lines).encode()
        if not text:
            return
        with self._telling():
            if self._file is None:
                self._file = self.path.open("ab", buffering=0)
                _sync_folder(self.path.parent)
            left = memoryview(text)
            while left:
                left = left[os.write(self._file.fileno(), left) :]
            os.fsync(self._file.fileno())
            found = os.fstat(self._file.fileno())
        self.written = self.written.and_then(text)
        if found.st_size != self.written.size or not found.st_nlink:
            raise InvalidBatch(
                f"{escaped(str(self.path))} was removed or changed while it was written: answers are gone from it. Put "
                "it back as it was, or begin another batch: with another output."
            )

    def empty(self) -> None:
        self.written = Written()
        if self.path.exists():
            with self._telling(), self.path.open("wb") as file:
                # Behind a power cut it would be taken for how what is sent next ended.
                os.fsync(file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except OSError as fault:
            what = f"{escaped(str(self.path))} cannot be written: {fault.strerror}. {ONCE_IT_CAN}"
            raise OutputUnwritable(what) from fault


def _sync_folder(path: Path) -> None:
    # Where a folder cannot be opened, its entries are on the disk with the file.
    if hasattr(os, "O_DIRECTORY"):
        folder = os.open(path, os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _read(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) else None
