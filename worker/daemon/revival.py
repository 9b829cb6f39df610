"""Decides when a dead child is started again, and when to give up. Pure: starts nothing, reads no clock."""

from dataclasses import dataclass

# Long enough that a child which dies of its load (a poison job, memory that fills) still meets growing pauses.
STEADY_SECONDS = 60.0
MAX_PAUSE_SECONDS = 60.0
MAX_DEATHS_BEFORE_READY = 5


@dataclass(slots=True)
class Revival:
    """One child's history: how often it died in a row, and how often of these before it was ever ready."""

    deaths: int = 0
    deaths_before_ready: int = 0

    def pause_after_death(self, ready_seconds: float | None) -> float | None:
        """Seconds to wait before the next start (1, 2, 4 .. 60), or None to give up.

        `ready_seconds` is how long this run had been ready for, None if it never was. A run that was ready for
        `STEADY_SECONDS` clears the history.
        """
        if ready_seconds is None:
            self.deaths_before_ready += 1
            if self.deaths_before_ready >= MAX_DEATHS_BEFORE_READY:
                return None
        else:
            self.deaths_before_ready = 0
            if ready_seconds >= STEADY_SECONDS:
                self.deaths = 0
        self.deaths += 1
        return min(2.0 ** (self.deaths - 1), MAX_PAUSE_SECONDS)
