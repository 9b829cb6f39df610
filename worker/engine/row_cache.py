"""What the tower made of media, kept within a bound for who shows them next; the least recently seen goes first."""

from torch import Tensor


class RowCache:
    """Rows [n, H] by what they were made of, at most `max_bytes` of them."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        # The one seen last is the last.
        self._rows: dict[bytes, Tensor] = {}

    def find(self, key: bytes) -> Tensor | None:
        rows = self._rows.pop(key, None)
        if rows is not None:
            self._rows[key] = rows
        return rows

    def keep(self, key: bytes, rows: Tensor) -> Tensor:
        """Returns the rows as they are kept; those that are larger than all it may have are not."""
        if rows.nbytes > self._max_bytes:
            return rows
        if rows.untyped_storage().nbytes() > rows.nbytes:
            rows = rows.clone()  # Else the rows of all that were encoded with it would stay, too.
        self.forget(key)
        self._rows[key] = rows
        self._num_bytes += rows.nbytes
        while self._num_bytes > self._max_bytes:
            self.forget(next(iter(self._rows)))
        return rows

    def forget(self, key: bytes) -> None:
        rows = self._rows.pop(key, None)
        if rows is not None:
            self._num_bytes -= rows.nbytes

    def clear(self) -> bool:
        """Whether there was anything to let go of."""
        had_any = bool(self._rows)
        self._rows.clear()
        self._num_bytes = 0
        return had_any
