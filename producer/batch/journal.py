"""What a batch knows of its lines, whatever dies: a SQLite database beside its output, which one process has at a time.

What is to be sent is written here first, and what has ended once it stands in the output.
"""

import sqlite3
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from keye.config.contract import escaped
from keye.config.faults import InvalidBatch, KeyeError, OutputUnwritable
from keye.producer.batch.lines import Ended, Line, Row, State
from keye.producer.batch.source import Position
from keye.producer.batch.written import ONCE_IT_CAN, Written

SUFFIX = ".journal"
_FORMAT = 1
_TABLES = """
create table batch (
    format integer, id text, asked text, begun_at real,
    end default 0, number integer default 0, checksum integer default 0, num_passed_over integer default 0,
    output_bytes integer default 0, output_checksum integer default 0,
    errors_bytes integer default 0, errors_checksum integer default 0
);
create table lines (
    number integer primary key,
    start,              -- where the source finds it again
    custom_id text unique,
    is_openai integer,  -- the form of its answer
    state integer,
    sent_at real,       -- when it was about to be sent last
    run integer default 0,  -- how often it was sent again after a failure
    owner text,         -- the job that had its idempotency key
    ended_at real,
    seconds real,       -- from its submission, where it was answered
    code text           -- why it was not
);
create index unended on lines (number) where state < 2;
create index unsent on lines (number) where state = 4
"""
# Of SQLite, from whom the disk takes nothing.
_UNWRITABLE = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY)

_NEW_LINE = (
    "insert into lines (number, start, custom_id, is_openai, state, sent_at) values (?, ?, ?, ?, ?, ?) "
    "on conflict (custom_id) do nothing"
)


class Journal:
    """Raises `InvalidBatch` where it is another batch's or another process has it, `OutputUnwritable` of its disk."""

    def __init__(self, path: str, asked: str) -> None:
        """`asked` is all beside the lines that decides what they ask, and stays as it was."""
        self._path = path
        with self._telling(), ExitStack() as opened:
            self._db = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
            opened.callback(self._db.close)
            # No other process needs shared memory, which network disks do not have.
            for pragma in ("locking_mode = exclusive", "journal_mode = wal"):
                self._db.execute(f"pragma {pragma}")
            self._db.execute("begin immediate")
            if not self._db.execute("select 1 from sqlite_master").fetchone():
                for statement in _TABLES.split(";"):
                    self._db.execute(statement)
                begun = _FORMAT, str(uuid.uuid4()), asked, time.time()
                self._db.execute("insert into batch (format, id, asked, begun_at) values (?, ?, ?, ?)", begun)
            # Of no line yet it can still become any batch.
            begin = "update batch set asked = ?, end = 0, number = 0, checksum = 0, num_passed_over = 0"
            self._db.execute(f"{begin} where not exists (select 1 from lines)", (asked,))
            self._db.execute("commit")
            found = self._db.execute("select format, id, asked, begun_at from batch").fetchone()
            if found is None or found[0] != _FORMAT:
                raise sqlite3.DatabaseError("another release wrote it")
            _, self.id, was_asked, self.begun_at = found
            if was_asked != asked:
                raise InvalidBatch(
                    f"{escaped(path)} is that of a batch that asks something else: {escaped(was_asked)}. Go on with it "
                    "as it was begun, or begin another: with another output."
                )
            opened.pop_all()

    def job_id(self, row: Row) -> str:
        """The same whoever asks: sent twice, the job is queued once. It tells the line, too."""
        return row.owner or f"{self.id}.{row.number}.{row.run}"

    @property
    def position(self) -> Position:
        return Position(*self._one("select end, number, checksum, num_passed_over from batch"))

    @property
    def written(self) -> tuple[Written, Written]:
        """How much of the output, and of the errors, is known here."""
        output = Written(*self._one("select output_bytes, output_checksum from batch"))
        return output, Written(*self._one("select errors_bytes, errors_checksum from batch"))

    def add(self, lines: Iterable[Line], position: Position) -> list[Row]:
        """Where an earlier one has its custom_id, it gets none."""
        added: list[Row] = []
        now = time.time()
        with self._changing("normal") as db:
            for line in lines:
                row = Row(line.number, line.start, line.custom_id, line.is_openai, State.UNSENT, now)
                if not db.execute(_NEW_LINE, row[:6]).rowcount:
                    row = row._replace(custom_id=None)
                    db.execute(_NEW_LINE, row[:6])
                added.append(row)
            db.execute("update batch set end = ?, number = ?, checksum = ?, num_passed_over = ?", position)
        return added

    def unsent(self, at_a_time: int) -> Iterator[Row]:
        """Those that are to be sent, of which so many are read at a time."""
        rows = self._rows("state = 4 order by number limit ?", at_a_time)
        while rows:
            yield from rows
            rows = self._rows("state = 4 and number > ? order by number limit ?", rows[-1].number, at_a_time)

    def mark_sending(self, rows: Iterable[Row]) -> None:
        """They are about to be sent."""
        self._mark("full", rows)

    def mark_sent(self, rows: Iterable[Row]) -> None:
        """They are queued by now, or were not taken."""
        self._mark("normal", rows)

    def _mark(self, synchronous: str, rows: Iterable[Row]) -> None:
        with self._changing(synchronous) as db:
            update = "update lines set state = ?, sent_at = ?, owner = ? where number = ?"
            db.executemany(update, [(row.state, row.sent_at, row.owner, row.number) for row in rows])

    def end(self, ended: Iterable[Ended], output: Written, errors: Written) -> None:
        """These have ended, and stand in the output or the errors, which have so much by now."""
        with self._changing() as db:
            for number, at, seconds, code in ended:
                state = State.ANSWERED if code is None else State.FAILED
                end = "update lines set state = ?, ended_at = ?, seconds = ?, code = ? where number = ?"
                db.execute(end, (state, at, seconds, code, number))
            db.execute(
                "update batch set output_bytes = ?, output_checksum = ?, errors_bytes = ?, errors_checksum = ?",
                (*output, *errors),
            )

    def retry_failed(self) -> None:
        """All that failed are to be sent once more, under another id, and no error is known any more."""
        with self._changing() as db:
            again = (
                "update lines set state = 4, run = run + 1, owner = null, ended_at = null, code = null where state = 3"
            )
            db.execute(again)
            db.execute("update batch set errors_bytes = 0, errors_checksum = 0")

    def unended(self) -> list[Row]:
        """Those that were sent, or may have been."""
        return self._rows("state < 2 order by number")

    def find(self, custom_id: str | None, job_id: Any) -> Row | None:
        """The line that is so called, or whose job it is where it is called nothing."""
        if custom_id is None:
            batch_id, _, line = str(job_id).partition(".")
            rows = self._rows("custom_id is null and number = ?", line.partition(".")[0]) if batch_id == self.id else []
        else:
            rows = self._rows("custom_id = ?", custom_id)
        return next(iter(rows), None)

    def number_of(self, custom_id: str) -> int:
        """Of the line that is so called."""
        return int(self._one("select number from lines where custom_id = ?", custom_id)[0])

    def counts(self) -> dict[State, int]:
        with self._telling():
            found = self._db.execute("select state, count(*) from lines group by state").fetchall()
        return {state: dict(found).get(state, 0) for state in State}

    def answered(self, custom_id: str) -> tuple[Row, float | None] | None:
        """The line that is so called, if it was answered, and in how many seconds; None where a crash took that."""
        rows = self._rows("state = 2 and custom_id = ?", custom_id)
        if not rows:
            return None
        (seconds,) = self._one("select seconds from lines where number = ?", rows[0].number)
        return rows[0], seconds

    def failures(self) -> dict[str, int]:
        """How many lines have failed with each code, most first."""
        return dict(self._all("select code, count(*) from lines where state = 3 group by code order by 2 desc, 1"))

    def first_and_last_end(self) -> tuple[float, float] | None:
        """When, Unix seconds."""
        first, last = self._one("select min(ended_at), max(ended_at) from lines")
        return None if first is None else (first, last)

    def ends(self, start: float, width: float) -> list[tuple[int, State, int]]:
        """How many lines were answered, or failed, in each span of so many seconds from `start` on."""
        spans = "select cast((ended_at - ?) / ? as integer), state, count(*) from lines"
        found = self._all(f"{spans} where state in (2, 3) group by 1, 2", start, width)
        return [(index, State(state), count) for index, state, count in found]

    def seconds(self) -> Iterator[float]:
        """Of each answer, the shortest first."""
        with self._telling():
            answers = "select max(seconds, 0) from lines where state = 2 and seconds is not null order by seconds"
            yield from (seconds for (seconds,) in self._db.execute(answers))

    def close(self) -> None:
        with self._telling():
            self._db.close()

    def _rows(self, where: str, *values: Any) -> list[Row]:
        with self._telling():
            found = self._db.execute(
                f"select number, start, custom_id, is_openai, state, sent_at, run, owner from lines where {where}",
                values,
            ).fetchall()
        return [Row(*each)._replace(state=State(each[4])) for each in found]

    def _all(self, query: str, *values: Any) -> list[Any]:
        with self._telling():
            return self._db.execute(query, values).fetchall()

    def _one(self, query: str, *values: Any) -> tuple[Any, ...]:
        with self._telling():
            found: tuple[Any, ...] = self._db.execute(query, values).fetchone()
        return found

    @contextmanager
    def _changing(self, synchronous: str = "full") -> Iterator[sqlite3.Connection]:
        """On the disk afterwards; "normal" outlives this process at once, and is on the disk with what comes next."""
        with self._telling():
            self._db.execute(f"pragma synchronous = {synchronous}")
            self._db.execute("begin")
            yield self._db
            self._db.execute("commit")

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as fault:
            kind: type[KeyeError] = InvalidBatch
            why = f"cannot be used: {fault}. It is what this batch goes on by."
            # What Python itself raises has none; the upper bytes are details.
            code = getattr(fault, "sqlite_errorcode", 0) & 0xFF
            if code == sqlite3.SQLITE_BUSY:
                why = "is in use: this batch is running already."
            elif code in _UNWRITABLE:
                why, kind = f"cannot be written: {fault}. {ONCE_IT_CAN}", OutputUnwritable
            raise kind(f"{escaped(self._path)} {why}") from fault
