"""How far a batch is."""

from typing import NamedTuple


class BatchProgress(NamedTuple):
    """Of the `lines` that were read so far. `share` is how much of the input that is, from 0 to 1, None where nobody
    knows; `is_read` whether it is all. `trouble` is what it waits for beside answers, or why it has no report at its
    end, "" for nothing; `has_worker` is False while no worker with its model loaded is alive. Of the lines that have
    ended `ended_before` had when this run began, None until that is known. Files of a folder or a prefix that are no
    media by their names are `passed_over`.
    """

    lines: int
    answered: int
    failed: int
    in_flight: int
    share: float | None
    is_read: bool
    trouble: str
    has_worker: bool
    ended_before: int | None
    passed_over: int

    @property
    def ended(self) -> int:
        return self.answered + self.failed

    @property
    def expected(self) -> int | None:
        """Lines in all, as far as that is known."""
        return self.lines if self.is_read else round(self.lines / self.share) if self.share else None
