"""A medium that was fetched: an open file, and what tells its bytes from any others."""

import os
import time
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, Self

# Of what a store tells; AWS' own are shorter. More of it, of 64 media, would be a burden to whoever reads the result.
_MAX_TOLD = 256

# More than a file system's clock stands still for; FAT's does for 2.
_RESTED_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class Identity:
    """`sha256` (hexadecimal) is of the open file itself: no name is looked up a second time for it.

    `etag`, `version_id` and `last_modified` are as the store or the server told them; `modified_at` (Unix seconds) and
    `inode` are a local file's.
    """

    num_bytes: int
    sha256: str | None = None
    etag: str | None = None
    version_id: str | None = None
    last_modified: str | None = None
    modified_at: float | None = None
    inode: int | None = None

    @classmethod
    def of_local(cls, file: BinaryIO) -> Self:
        found = os.fstat(file.fileno())
        return cls(found.st_size, modified_at=found.st_mtime, inode=found.st_ino)


@dataclass(frozen=True, slots=True)
class Fetched:
    """`file` is the system's own, so that a child can be handed it; as a context this is the file, closed behind it."""

    file: BinaryIO
    identity: Identity

    def told(self, **facts: Any) -> Self:
        """With more of its identity."""
        return replace(self, identity=replace(self.identity, **facts))

    def was_written_to(self) -> bool:
        """Whether a local file is another by now, which may have been so before it was read whole."""
        if self.identity.inode is None:
            return False
        now = Identity.of_local(self.file)
        return (now.num_bytes, now.modified_at) != (self.identity.num_bytes, self.identity.modified_at)

    def content(self) -> tuple[object, ...] | None:
        """What tells its bytes, as they are now, from any others; None where nothing does.

        A local file, which others may write to, is told by where it lies and when it was changed last, a time that
        nobody can set; not right after a change, when a file system's clock may not have moved on yet.
        """
        if self.identity.inode is None:
            return None if self.identity.sha256 is None else (self.identity.sha256,)
        try:
            found = os.fstat(self.file.fileno())
        except OSError:  # its server is away
            return None
        if time.time() - found.st_ctime < _RESTED_SECONDS:
            return None
        stamp = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        return (*stamp, self.identity.sha256)

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> BinaryIO:
        return self.file

    def __exit__(self, *error: object) -> None:
        self.close()


def as_told(value: Any) -> str | None:
    """What a store says of a medium, where it is printable ASCII of a bounded length; else None."""
    is_fit = isinstance(value, str) and value.isascii() and value.isprintable() and 0 < len(value) <= _MAX_TOLD
    return value if is_fit else None
