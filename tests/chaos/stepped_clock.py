"""A server's clock that is set while it runs, by a library that stands before the C library's: stepped_clock.c."""

import subprocess
from pathlib import Path

from tests.support.debian import need


class SteppedClock:
    """Of whatever is started with `environ`: right until it is set."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "clock_offset"
        self._ahead_us = 0
        self.step(0)
        library = folder / "stepped_clock.so"
        source = Path(__file__).with_suffix(".c")
        subprocess.run([need("gcc"), "-O1", "-shared", "-fPIC", "-o", library, source], check=True)
        self.environ = {"LD_PRELOAD": str(library), "CLOCK_OFFSET_FILE": str(self._file)}

    def step(self, seconds: float) -> None:
        """Set it forward, or back, at once."""
        self._ahead_us += round(seconds * 1e6)
        # Not anew: the server looks into this very file.
        with self._file.open("r+b" if self._file.exists() else "wb") as file:
            file.write(self._ahead_us.to_bytes(8, "little", signed=True))
