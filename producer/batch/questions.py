"""What a batch still has to ask: what its lines say, with what is said for all of them."""

from collections.abc import Iterator, Mapping
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from keye.config.contract import escaped
from keye.config.faults import InvalidJob, Refusal
from keye.config.wire import SealedJob
from keye.producer.batch.lines import Line, Row
from keye.producer.batch.source import Source

if TYPE_CHECKING:
    # By way of SQLite, which not every Python has.
    from keye.producer.batch.journal import Journal
    from keye.producer.client import Client

# Read at a time; and how many bytes of a file these are, which are held several times meanwhile.
LINES_AT_A_TIME, BYTES_AT_A_TIME = 250, 8 * 2**20

# Where a line says one of them, none of those that are said for all is asked of it.
_ASK = {"prompt", "messages", "questions"}


class Questions:
    """`num_lines` are in the journal, and `is_read` is whether these are all that the source has."""

    def __init__(self, client: "Client", source: Source, journal: "Journal", defaults: Mapping[str, Any]) -> None:
        """`defaults` are fields of a job that its line need not say."""
        self._client = client
        self._source = source
        self._journal = journal
        self._defaults = defaults
        self.num_lines = sum(journal.counts().values())
        self.is_read = False

    def sealed(self) -> Iterator[tuple[Row, SealedJob | Refusal]]:
        """All that is to be sent. Raises `InvalidBatch` where the source cannot be read any more."""
        for row, line in chain(self._old(), self._new()):
            (sealed,) = self._client.seal_all([self._asked(row, line)])
            if isinstance(sealed, SealedJob):
                sealed = sealed.model_copy(update={"job_id": self._journal.job_id(row)})
            yield row, sealed

    def _old(self) -> Iterator[tuple[Row, Line]]:
        """Lines that were read before and not sent, or that failed."""
        for row in self._journal.unsent(LINES_AT_A_TIME):
            yield row, self._source.read(row.number, row.start)

    def _new(self) -> Iterator[tuple[Row, Line]]:
        lines = self._source.lines()
        while not self.is_read:
            some = list(self._some(lines))
            self.is_read = not some
            rows = self._journal.add(some, self._source.position)
            self.num_lines += len(rows)
            yield from zip(rows, some, strict=True)

    def _some(self, lines: Iterator[Line]) -> Iterator[Line]:
        num_bytes = 0
        for line in islice(lines, LINES_AT_A_TIME):
            yield line
            if isinstance(line.start, int):
                num_bytes += int(self._source.position.end) - line.start
            if num_bytes > BYTES_AT_A_TIME:
                return

    def read(self, row: Row) -> Mapping[str, Any] | InvalidJob:
        """What it asks, once more."""
        return self._asked(row, self._source.read(row.number, row.start))

    def _asked(self, row: Row, line: Line) -> Mapping[str, Any] | InvalidJob:
        """The fields of its job, or why it has none; with the number of its line."""
        asked = line.asked
        if line.custom_id is not None and row.custom_id is None:
            number = self._journal.number_of(line.custom_id)
            asked = InvalidJob(f"1 fault: custom_id: {escaped(line.custom_id)!r} is that of line {number} too")
        if isinstance(asked, InvalidJob):
            return asked
        fields = {**self._defaults, **asked}
        own, general = fields.get("generation"), self._defaults.get("generation")
        if isinstance(own, Mapping) and isinstance(general, Mapping):
            fields["generation"] = {**general, **own}
        if not asked.keys().isdisjoint(_ASK):
            for name in _ASK - asked.keys():
                fields.pop(name, None)
        return fields
