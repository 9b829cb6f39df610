"""How far an engine is and how full: what its metrics, and whoever asks whether it is fed, read of it."""

from dataclasses import dataclass


@dataclass(slots=True)
class EngineSnapshot:
    """Counters since the start (steps, their seconds, prompt tokens, preemptions, steps without room in memory), how
    full the engine is now, and what it may do in a step. `unread_tokens` are those of prompts of running sequences.
    """

    steps: int = 0
    step_seconds: float = 0.0
    prefill_tokens: int = 0
    preemptions: int = 0
    out_of_memory: int = 0
    running: int = 0
    max_running: int = 0
    waiting: int = 0
    unread_tokens: int = 0
    max_step_tokens: int = 0
    blocks_used: int = 0
    num_blocks: int = 0

    def has_room(self, num_sequences: int) -> bool:
        """For so many more: the next step would begin with them, if they are like those that run."""
        num_free = self.num_blocks - self.blocks_used
        return (
            not self.waiting
            and self.running + num_sequences <= self.max_running
            and num_sequences * self.blocks_used <= num_free * self.running
            and self.unread_tokens < self.max_step_tokens
        )
