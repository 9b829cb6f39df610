"""The decoder children of a process, as the kernel lists them."""

from contextlib import suppress
from pathlib import Path


def children_of(pid: int) -> set[int]:
    """The decoder children that process has now."""
    found = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        # Threads and children may end while they are listed.
        with suppress(FileNotFoundError, ProcessLookupError):
            for child in (task / "children").read_text().split():
                if b"keye.worker.media.decode.child" in Path(f"/proc/{child}/cmdline").read_bytes():
                    found.add(int(child))
    return found
