"""Where the jobs of a batch are given: in the lines of a file, or in the rows of a table. Reads, and sends nothing.

What a folder or a bucket holds is in `listing`.
"""

import codecs
import csv
import json
import os
import re
import shlex
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO, NamedTuple, Protocol

from keye.config.contract import escaped
from keye.config.familiar_names import OF_A_JOB
from keye.config.faults import InvalidBatch, InvalidJob
from keye.config.formats import HEAD_BYTES, format_of
from keye.config.job import AnalysisJob, GenerationOptions
from keye.config.wire import MAX_SEALED_BYTES
from keye.producer.batch.lines import Line, named, read_fields
from keye.producer.batch.openai import read_request
from keye.producer.batch.written import Written
from keye.producer.medium import open_at_once

_BYTES_AT_A_TIME = 2**20
_TOO_LONG = (
    f"1 fault: job: has more than {MAX_SEALED_BYTES:,} bytes, the limit. Put its media where workers find them, and "
    "give their URIs"
)
_NAMED_FIRST = re.compile(rb'\s*\{\s*"custom_id"\s*:\s*"(?:[^"\\]|\\.)*+"')
TABLE_SUFFIXES = (".csv", ".tsv")
_MEDIA = ("media", "image", "video")
_OF_A_JOB = AnalysisJob.model_fields.keys() - {"media", "messages", "generation", "metadata"}


class Position(NamedTuple):
    """How far a source was read: up to `end`, `number` lines; `checksum` is the CRC-32 of all that, 0 of a listing.

    Of a listing `num_passed_over` names before `end` are those of no media.
    """

    end: int | bytes = 0
    number: int = 0
    checksum: int = 0
    num_passed_over: int = 0


class Source(Protocol):
    """`position` is behind the line that `lines` gave last, `num_passed_over` counts names of no media."""

    position: Position
    num_passed_over: int

    def go_to(self, position: Position) -> None:
        """Where an earlier run was. Raises `InvalidBatch` where what it has read is not what stands there now."""

    def lines(self) -> Iterator[Line]:
        """What follows on `position`. Raises `InvalidBatch` where it cannot be read any more."""

    def read(self, number: int, start: Any) -> Line:
        """One of them once more. Raises `InvalidBatch` where it is not there any more."""

    def share(self) -> float | None:
        """How much of it is read, from 0 to 1, where that is known."""

    def close(self) -> None: ...


class _Lines:
    """The lines of a file as they stand there, from a position on, without what is beyond the longest."""

    def __init__(self, file: BinaryIO, position: Position) -> None:
        self._file = file
        # Behind a line that is not ended, which is the last, even where somebody is still writing it.
        self._end: int | None = None
        self.go_back(position)

    @property
    def position(self) -> Position:
        return Position(self._offset, self.number, self._checksum)

    def go_back(self, position: Position) -> None:
        self._offset, self.number, self._checksum = int(position.end), position.number, position.checksum
        self._file.seek(self._offset)

    def __iter__(self) -> Iterator[bytes]:
        while self._offset != self._end and (text := self._read(MAX_SEALED_BYTES + 1)):
            self.number += 1
            part = text
            while len(text) > MAX_SEALED_BYTES and not part.endswith(b"\n") and (part := self._read(_BYTES_AT_A_TIME)):
                pass
            if not part.endswith(b"\n"):
                self._end = self._offset
            yield text.removeprefix(codecs.BOM_UTF8) if self.number == 1 else text

    def _read(self, size: int) -> bytes:
        part = self._file.readline(size)
        self._offset += len(part)
        self._checksum = zlib.crc32(part, self._checksum)
        return part


class _File:
    """A file of records, to which others may be added, and of which those that were read stay."""

    num_passed_over = 0

    def __init__(self, path: str) -> None:
        self._path = path
        self._file = _open(path)
        self._size = os.fstat(self._file.fileno()).st_size
        self.position = Position()

    def lines(self) -> Iterator[Line]:
        with _reading(self._path):
            lines = _Lines(self._file, self.position)
            for line in self._records(lines):
                self.position = lines.position
                yield line
            self.position = lines.position

    def read(self, number: int, start: Any) -> Line:
        with _open(self._path) as file, _reading(self._path):
            for line in self._records(_Lines(file, Position(start, number - 1))):
                return line
        raise InvalidBatch(f"{escaped(self._path)} has no line {number:,} any more.")

    def go_to(self, position: Position) -> None:
        known = Written(int(position.end), position.checksum)
        with _open(self._path) as file, _reading(self._path):
            is_same = Written.read(file, known.size) == known
            file.seek(max(0, known.size - 1))
            if known.size and file.read(1) != b"\n":
                # The last line was not ended. If it is longer now, somebody was still writing it.
                end = file.readline(MAX_SEALED_BYTES)
                is_same = is_same and not end.strip()
                known = known.and_then(end)
            if not is_same:
                raise InvalidBatch(
                    f"{escaped(self._path)} is not what it was: its first {position.number:,} lines were read before, "
                    "and have changed since. Put it back as it was, or begin another batch: with another output."
                )
        self.position = position._replace(end=known.size, checksum=known.checksum)

    def share(self) -> float:
        return min(1.0, int(self.position.end) / self._size) if self._size else 1.0

    def close(self) -> None:
        self._file.close()

    def _records(self, lines: _Lines) -> Iterator[Line]:
        raise NotImplementedError


class JsonLines(_File):
    """A job in each line: the fields of one of ours, with a `custom_id` (or `id`), or what an OpenAI batch asks."""

    def _records(self, lines: _Lines) -> Iterator[Line]:
        start = lines.position.end
        for text in lines:
            if text.strip():
                line_of = _line_of_json if len(text) <= MAX_SEALED_BYTES else _line_too_long
                yield line_of(lines.number, start, text)
            start = lines.position.end


def _line_of_json(number: int, start: int | bytes, text: bytes) -> Line:
    fields = read_fields(text)
    if isinstance(fields, InvalidJob):
        return Line(number, start, None, fields, is_openai=b'"body"' in text)
    is_openai = "body" in fields
    given, custom_id = fields.pop("custom_id" if "custom_id" in fields else "id", None), None
    try:
        custom_id = named(f"line-{number}" if given is None else given)
        return Line(number, start, custom_id, read_request(fields) if is_openai else fields, is_openai)
    except InvalidJob as fault:
        return Line(number, start, custom_id, fault, is_openai)


def _line_too_long(number: int, start: int | bytes, text: bytes) -> Line:
    """`text` is its beginning, where it mostly says what it is called."""
    line = Line(number, start, None, InvalidJob(_TOO_LONG), is_openai=b'"body"' in text)
    if first := _NAMED_FIRST.match(text):
        line = line._replace(custom_id=_line_of_json(number, start, first[0] + b"}").custom_id)
    return line


class Table(_File):
    """A job in each row of a table whose first names its columns.

    `custom_id` (or `id`) names the job; `media`, `image` and `video`, each as often as need be, hold its media; fields
    of a job and of its generation are called as those are; all other columns are its metadata. An empty cell says
    nothing.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path)
        # A comma is a decimal point to half of Europe, whose spreadsheets put semicolons.
        self._delimiter = max(",;\t", key=self._file.readline(MAX_SEALED_BYTES).decode(errors="replace").count)
        try:
            self.columns = [name.strip() for name in self._row(_Lines(self._file, Position())) or ()]
            while self.columns and not self.columns[-1]:
                # Spreadsheets leave empty cells behind the last.
                del self.columns[-1]
            fault = self._fault_of_columns()
        except InvalidJob as no_row:
            fault = str(no_row)
        if fault:
            self.close()
            raise InvalidBatch(
                f"{escaped(path)}: line 1: {fault}. The first row names the columns, such as media,prompt."
            )

    def _fault_of_columns(self) -> str | None:
        if "" in self.columns or not self.columns:
            return "does not name every column"
        if twice := {name for name in self.columns if self.columns.count(name) > 1} - set(_MEDIA):
            return f"says {escaped(', '.join(sorted(twice)))} twice"
        if not set(_MEDIA).isdisjoint(self.columns):
            return None
        # It would be asked without them, and nobody be told.
        for name in self.columns:
            if OF_A_JOB.get(name.lower()) == OF_A_JOB["image_url"]:
                return f"calls a column {escaped(name)}: media are in those called {', '.join(_MEDIA)}"
        return None if "prompt" in self.columns else f"calls no column prompt, {', '.join(_MEDIA)}"

    def _row(self, lines: _Lines) -> list[str] | None:
        """The next, None behind the last. Raises `InvalidJob`; what follows is then behind its first line."""
        start, behind = int(lines.position.end), []

        def texts() -> Iterator[str]:
            for text in lines:
                behind.append(lines.position)
                if int(lines.position.end) - start > MAX_SEALED_BYTES:
                    raise InvalidJob(_TOO_LONG)
                yield text.decode()

        try:
            rows = csv.reader(texts(), delimiter=self._delimiter, skipinitialspace=True, strict=True)
            return next(rows, None)
        except (UnicodeDecodeError, csv.Error, InvalidJob) as fault:
            # A quote that is not closed takes rows with it that are right.
            lines.go_back(behind[0])
            if not isinstance(fault, InvalidJob):
                why = escaped(str(fault))
                fault = InvalidJob(
                    f"1 fault: job: is no row of a table in UTF-8 ({why}). A line of JSON holds any text"
                )
            raise fault from None

    def _records(self, lines: _Lines) -> Iterator[Line]:
        while True:
            start, number = lines.position.end, lines.number + 1
            try:
                if (row := self._row(lines)) is None:
                    return
                if start and any(row):
                    yield self._line_of(number, start, row)
            except InvalidJob as fault:
                yield Line(number, start, None, fault)

    def _line_of(self, number: int, start: int | bytes, row: list[str]) -> Line:
        """Raises `InvalidJob`."""
        if any(row[len(self.columns) :]):
            raise InvalidJob(f"1 fault: job: is a row of {len(row)} cells, the first has {len(self.columns)}")
        named_by = "custom_id" if "custom_id" in self.columns else "id"
        custom_id = f"line-{number}"
        fields: dict[str, Any] = {"media": [], "generation": {}, "metadata": {}}
        for name, cell in zip(self.columns, row, strict=False):
            if not cell:
                continue
            if name == named_by:
                custom_id = named(cell)
            elif name == "media":
                fields["media"].append(cell)
            elif name in _MEDIA:
                fields["media"].append({"type": name, "uri": cell})
            elif name in GenerationOptions.model_fields:
                fields["generation"][name] = [cell] if name == "stop" else cell
            elif name in _OF_A_JOB:
                fields[name] = _of_cell(name, cell)
            else:
                fields["metadata"][name] = cell
        return Line(number, start, custom_id, fields)


def _of_cell(name: str, cell: str) -> Any:
    """What is no plain text stands there as JSON; a regular expression may begin as a list does."""
    if name in ("questions", "response_schema") and cell.startswith(("{", "[")):
        with suppress(ValueError, RecursionError):
            return json.loads(cell)
    return cell


def open_file(path: str) -> JsonLines | Table:
    """A table where its suffix says so. Raises `InvalidBatch`, also where another kind of file was given."""
    is_table = path.lower().endswith(TABLE_SUFFIXES)
    with _open(path) as file, _reading(path):
        head = file.read(HEAD_BYTES)
    found = "UTF-16" if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else format_of(head).name
    # What a line of JSON or of a table may begin with, others may too.
    if re.match(rb".{0,3}[\0-\x08\x0e-\x1f\x80-\xff]", head, re.DOTALL) and found != "something unknown":
        raise InvalidBatch(
            f"{escaped(path)} looks like {found}. Give lines of JSON, or a table (.csv, .tsv), as text in UTF-8."
        )
    if not is_table and (odd := re.match(rb"(\xef\xbb\xbf)?\s*(\[\s*\{|\{\s*\n\s*\")", head)):
        is_array = odd[2].startswith(b"[")
        raise InvalidBatch(
            f"{escaped(path)} is JSON, but not a job in each line. Make lines of it: "
            f"{escaped(shlex.join(('jq', '-c', '.[]' if is_array else '.', path)))} > lines.jsonl"
        )
    return Table(path) if is_table else JsonLines(path)


def _open(path: str) -> BinaryIO:
    with _reading(path):
        try:
            file = open(path, "rb", opener=open_at_once)  # noqa: SIM115
        except ValueError as fault:
            raise OSError(0, str(fault)) from None
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return file
        file.close()
        raise OSError(0, "it is no file, which could be gone back to")


@contextmanager
def _reading(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as fault:
        raise InvalidBatch(f"{escaped(path)} cannot be read: {escaped(fault.strerror or str(fault))}.") from None
