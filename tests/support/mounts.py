"""File systems of a test's own, which are full or go away for real."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def mounted(folder: Path, num_bytes: int = 2**20) -> Iterator[None]:
    """A file system in memory at `folder`, made where it is missing; skips where none may be mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={num_bytes},mode=700", "keye-test", folder],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"no file system may be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        # Lazily: what a test that fails has still open must not keep it.
        subprocess.run(["umount", "-l", folder], check=True)
