"""How many faults and how long: the short form runs with all tests, the long one (`SOAK=1`) by `make soak`."""

import os
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scale:
    lease_seconds: float
    num_kills: int
    num_kills_in_the_pop: int
    num_restarts: int
    full_engine_job_seconds: float
    longest_job_seconds: float
    drain_seconds: float
    broker_away_seconds: tuple[float, ...]
    refusal_seconds: float
    cut_off_seconds: float
    deadline_seconds: float
    num_hostile_messages: int
    num_damaged_files: int
    num_histories: int
    num_media: int
    num_batch_lines: int
    num_batch_kills: int

    @property
    def restart_seconds(self) -> float:
        """A lease, the reaper's two turns, and a process that may have to take a late delivery first."""
        return self.lease_seconds + max(3.0, self.lease_seconds / 6)


SHORT = Scale(
    lease_seconds=3,
    num_kills=30,
    num_kills_in_the_pop=1,
    num_restarts=1,
    full_engine_job_seconds=1.5,
    longest_job_seconds=7,
    drain_seconds=2,
    broker_away_seconds=(5,),
    refusal_seconds=5,
    cut_off_seconds=6,
    deadline_seconds=12,
    num_hostile_messages=2000,
    num_damaged_files=60,
    num_histories=40,
    num_media=150,
    num_batch_lines=2000,
    num_batch_kills=4,
)
LONG = Scale(
    lease_seconds=30,
    num_kills=1000,
    num_kills_in_the_pop=30,
    num_restarts=20,
    full_engine_job_seconds=4,
    longest_job_seconds=1200,
    drain_seconds=60,
    broker_away_seconds=(10, 300),
    refusal_seconds=60,
    cut_off_seconds=60,
    deadline_seconds=90,
    num_hostile_messages=200_000,
    num_damaged_files=500,
    num_histories=2000,
    num_media=10_000,
    num_batch_lines=20_000,
    num_batch_kills=20,
)
SCALE = LONG if os.environ.get("SOAK") else SHORT
