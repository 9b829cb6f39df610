"""The engine's door: what a job's thread hands in, and the generation it then follows. No tensors are touched here."""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Literal

from keye.config.codes import ErrorCode
from keye.config.faults import Fault
from keye.worker.host_fault import HostFault

if TYPE_CHECKING:
    from keye.worker.model.processor import PreparedPrompt

FinishReason = Literal["stop", "length", "abandoned", "deadline"]

# A reader rests this long between two deltas. Were it woken at every step, the readers of a small model would take
# Python's lock from the step thread more often than the steps themselves.
REST_SECONDS = 0.02

# So long after its deadline a generation has ended at a step, or the engine is in a very long one.
OVERRUN_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How tokens are chosen and when to stop. Temperature 0 is greedy, as is one too small to divide by; top_k 0 means
    all, `seed` None is a new one, `max_thinking_tokens` None no bound but `max_new_tokens`."""

    max_new_tokens: int
    temperature: float = 0
    top_p: float = 1
    top_k: int = 0
    repetition_penalty: float = 1
    stop: tuple[str, ...] = ()
    seed: int | None = None
    max_thinking_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Text that came since the last one, and how many tokens were generated meanwhile."""

    text: str
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Generated:
    """What a generation came to.

    `token_ids` holds all that was generated, the end token too; `text` neither special tokens nor the stop string nor
    what follows it. `has_cut_thinking` where `max_thinking_tokens` ended it. Seconds: from submitting to the first
    step, from submitting to the first token (None when there was none), from the first step to the end.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    num_prompt_tokens: int
    queued_seconds: float
    first_token_seconds: float | None
    generate_seconds: float
    has_cut_thinking: bool = False


class PendingGeneration:
    """One generation, seen by the thread that waits for it and by the thread that steps it."""

    def __init__(
        self, prompt: "PreparedPrompt", sampling: SamplingOptions, priority: int = 0, deadline: float = inf
    ) -> None:
        self.prompt = prompt
        self.sampling = sampling
        self.priority = priority
        self.deadline = deadline
        self.submitted_at = time.monotonic()
        self.is_abandoned = False
        self.has_begun = True
        """Cleared by an inbox whose engine lets generations wait for room, and set as it takes this one in."""
        self._is_awaited = False
        self._changed = threading.Condition()
        self._unread: list[str] = []
        self._num_unread_tokens = 0
        self._outcome: Generated | Fault | HostFault | None = None

    def deltas(self) -> Iterator[TextDelta]:
        """New text as it is generated; ends with the generation. One reader only.

        Where the engine does not end it at its deadline it is abandoned, and this ends without waiting any longer.
        Raises `Fault` when the generation failed, `HostFault` when its host did.
        """
        while True:
            with self._changed:
                if not self.wait(self._seconds_left):
                    self.abandon()
                    return
                delta = TextDelta("".join(self._unread), self._num_unread_tokens)
                has_ended = self.has_ended
                self._unread.clear()
                self._num_unread_tokens = 0
            if delta.text or delta.num_tokens:
                yield delta
            with self._changed:
                if not has_ended:
                    self._changed.wait_for(lambda: self.has_ended, timeout=REST_SECONDS)
                elif isinstance(self._outcome, Fault | HostFault):
                    raise self._outcome
                else:
                    return

    def wait(self, seconds: float) -> bool:
        """Whether within so many seconds there is text to read or the generation ends."""
        with self._changed:
            return self._changed.wait_for(lambda: bool(self._num_unread_tokens) or self.has_ended, seconds)

    def wait_to_begin(self, seconds: float = inf) -> bool:
        """Whether within so many seconds the engine takes it in among those it runs, or it ends."""
        with self._changed:
            self._is_awaited = True
            seconds = min(seconds, self._seconds_left)
            return self._changed.wait_for(lambda: self.has_begun or self.has_ended, seconds)

    @property
    def _seconds_left(self) -> float:
        """Until nobody waits for the engine any more."""
        return min(self.deadline + OVERRUN_SECONDS - time.monotonic(), threading.TIMEOUT_MAX)

    def abandon(self) -> None:
        """Stop at the next step, from any thread; what was generated so far is kept in `generated`."""
        self.is_abandoned = True

    @property
    def has_ended(self) -> bool:
        return self._outcome is not None

    @property
    def generated(self) -> Generated:
        """What it came to. Raises as `deltas` when it failed, and `RuntimeError` while it goes on."""
        if isinstance(self._outcome, Fault | HostFault):
            raise self._outcome
        if self._outcome is None:
            raise RuntimeError("the generation has not ended yet: read deltas() to the end first")
        return self._outcome

    def begin(self) -> None:
        """For the engine: its first step is next, there is room for it."""
        self.has_begun = True
        # Whoever waits for text is not woken for nothing.
        if self._is_awaited:
            with self._changed:
                self._changed.notify_all()

    def deliver(self, text: str, num_tokens: int) -> None:
        """For the engine: new text, and how many tokens it took."""
        with self._changed:
            if text:
                self._unread.append(text)
            if not self._num_unread_tokens:
                self._changed.notify_all()
            self._num_unread_tokens += num_tokens

    def end(self, outcome: Generated | Fault | HostFault) -> None:
        """For the engine: the generation has ended, with an answer or without."""
        with self._changed:
            self._outcome = outcome
            self._changed.notify_all()


class Inbox:
    """Where generations wait until the step thread takes them in."""

    def __init__(self, max_tokens: int, *, is_queue: bool = False) -> None:
        """`is_queue` where the engine lets what is handed in wait for room, and tells when it begins with it."""
        self.max_tokens = max_tokens
        self._is_queue = is_queue
        self._changed = threading.Condition()
        self._arrived: list[PendingGeneration] = []
        self._closed_by: Fault | HostFault | None = None
        self._is_woken = False

    def submit(
        self, prompt: "PreparedPrompt", sampling: SamplingOptions, *, priority: int = 0, deadline: float = inf
    ) -> PendingGeneration:
        """Hand in a prepared prompt; `priority` is how many steps below the highest, `deadline` is of `time.monotonic`.

        Raises `Fault` when it could never fit, however long it waited, and what the engine was closed with.
        """
        needed = len(prompt.input_ids) + sampling.max_new_tokens
        if needed > self.max_tokens:
            raise Fault(
                ErrorCode.PROMPT_TOO_LONG,
                f"Prompt and max_new_tokens need {needed} tokens, this worker holds {self.max_tokens} for one job. "
                "Shorten the text, or lower max_new_tokens, max_pixels, max_frames or fps.",
            )
        pending = PendingGeneration(prompt, sampling, priority, deadline)
        pending.has_begun = not self._is_queue
        with self._changed:
            if self._closed_by is not None:
                raise self._closed_by.with_traceback(None)
            self._arrived.append(pending)
            self._changed.notify()
        return pending

    def drain(self) -> list[PendingGeneration]:
        """For the engine: all that arrived since the last call, in order of arrival."""
        if not self._arrived:
            return []
        with self._changed:
            arrived, self._arrived = self._arrived, []
            return arrived

    def wait(self) -> None:
        """For the engine: sleep until something arrives or `wake` is called."""
        with self._changed:
            self._changed.wait_for(lambda: self._arrived or self._is_woken)
            self._is_woken = False

    def wake(self) -> None:
        """Let the engine look around although nothing arrived."""
        with self._changed:
            self._is_woken = True
            self._changed.notify()

    def close(self, fault: Fault | HostFault) -> list[PendingGeneration]:
        """For the engine: refuse what comes from now on with `fault`; returns what has not been taken in."""
        with self._changed:
            self._closed_by = fault
        return self.drain()
