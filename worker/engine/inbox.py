"""The engine's door: what a job's thread hands in, and the generations it then follows. No tensors are touched here."""

import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Literal

from keye.config.codes import ErrorCode
from keye.config.faults import Fault
from keye.worker.host_fault import HostFault

if TYPE_CHECKING:
    from keye.worker.engine.block_keys import BlockKeys
    from keye.worker.engine.constraint import Constraint
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
    all, `seed` None is a new one, `max_thinking_tokens` None no bound but `max_new_tokens`. Neither an end token nor a
    stop string ends it before `min_tokens`."""

    max_new_tokens: int
    temperature: float = 0
    top_p: float = 1
    top_k: int = 0
    repetition_penalty: float = 1
    stop: tuple[str, ...] = ()
    seed: int | None = None
    max_thinking_tokens: int | None = None
    min_tokens: int = 0
    logprobs: bool = False


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Text that came since the last one, and how many tokens were generated meanwhile."""

    text: str
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Generated:
    """What a generation came to.

    `token_ids` holds all that was generated, the end token too; `text` neither special tokens nor the stop string nor
    what follows it. `has_cut_thinking` where `max_thinking_tokens` ended it, `num_cached_tokens` of the prompt were in
    the engine's cache when it began. Seconds: from submitting to the first step, from submitting to the first token
    (None when there was none), from the first step to the end. `logprobs` are those of `token_ids` where they were
    asked for: natural logarithms, of what the model gave before all options.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    num_prompt_tokens: int
    queued_seconds: float
    first_token_seconds: float | None
    generate_seconds: float
    has_cut_thinking: bool = False
    num_cached_tokens: int = 0
    logprobs: tuple[float, ...] = ()


class PendingGeneration:
    """One generation, seen by the thread that waits for it and by the thread that steps it."""

    def __init__(
        self,
        prompt: "PreparedPrompt",
        sampling: SamplingOptions,
        priority: int = 0,
        deadline: float = inf,
        changed: threading.Condition | None = None,
        constraint: "Constraint | None" = None,
    ) -> None:
        """`changed` is notified of it, where one thread follows several."""
        self.prompt = prompt
        self.sampling = sampling
        self.constraint = constraint
        self.priority = priority
        self.deadline = deadline
        self.submitted_at = time.monotonic()
        self.is_abandoned = False
        self.block_keys: BlockKeys | None = None
        """Where the engine shares blocks of its cache: what those of the prompt hold."""
        self.has_begun = True
        """Cleared by an inbox whose engine lets generations wait for room, and set as it takes this one in."""
        self.is_awaited = False
        """Whether somebody waits until it begins."""
        self.changed = changed or threading.Condition()
        self._unread: list[str] = []
        self._num_unread_tokens = 0
        self._outcome: Generated | Fault | HostFault | None = None

    def deltas(self) -> Iterator[TextDelta]:
        """New text as it is generated; ends with the generation. One reader only.

        Where the engine does not end it at its deadline it is abandoned, and this ends without waiting any longer.
        Raises `Fault` when the generation failed, `HostFault` when its host did.
        """
        for _, delta, _ in Generations([self]).deltas():
            if delta.text or delta.num_tokens:
                yield delta
        if self.fault is not None:
            raise self.fault

    def take(self) -> TextDelta:
        """All text that came since it was called last. For whoever has the lock of `changed`."""
        delta = TextDelta("".join(self._unread), self._num_unread_tokens)
        self._unread.clear()
        self._num_unread_tokens = 0
        return delta

    @property
    def has_news(self) -> bool:
        """There is text to read, or it has ended."""
        return bool(self._num_unread_tokens) or self._outcome is not None

    def abandon(self) -> None:
        """Stop at the next step, from any thread; what was generated so far is kept in `generated`."""
        self.is_abandoned = True

    @property
    def has_ended(self) -> bool:
        return self._outcome is not None

    @property
    def fault(self) -> Fault | HostFault | None:
        """Why it failed, once it did."""
        return self._outcome if isinstance(self._outcome, Fault | HostFault) else None

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
        if self.is_awaited:
            with self.changed:
                self.changed.notify_all()

    def deliver(self, text: str, num_tokens: int) -> None:
        """For the engine: new text, and how many tokens it took."""
        with self.changed:
            if text:
                self._unread.append(text)
            if not self._num_unread_tokens:
                self.changed.notify_all()
            self._num_unread_tokens += num_tokens

    def end(self, outcome: Generated | Fault | HostFault) -> None:
        """For the engine: the generation has ended, with an answer or without."""
        with self.changed:
            self._outcome = outcome
            self.changed.notify_all()


class Generations:
    """Those of one job, in order, all with one `changed` and one deadline, followed by one thread."""

    def __init__(self, pending: Sequence[PendingGeneration]) -> None:
        self.pending = pending
        self._changed = pending[0].changed

    def deltas(self) -> Iterator[tuple[int, TextDelta, bool]]:
        """New text as it is generated, with its generation's place, and whether that ends with it. One reader only.

        This ends with the last of them; the last delta of each may be empty. Where the engine does not end them at
        their deadline they are abandoned, and nobody waits any longer. Raises nothing: see `fault` of each.
        """
        unended = dict(enumerate(self.pending))
        while unended:
            with self._changed:
                if not self._wait_for_news(unended.values(), self._seconds_left):
                    self.abandon()
                    return
                news = [(place, each.has_ended, each.take()) for place, each in unended.items() if each.has_news]
            for place, has_ended, delta in news:
                if has_ended:
                    del unended[place]
                yield place, delta, has_ended
            with self._changed:
                self._changed.wait_for(lambda: all(each.has_ended for each in unended.values()), REST_SECONDS)

    def wait(self, seconds: float) -> bool:
        """Whether within so many seconds there is text to read or one of them ends."""
        return self._wait_for_news(self.pending, seconds)

    def wait_to_begin(self, seconds: float = inf) -> bool:
        """Whether within so many seconds the engine takes one in among those it runs, or one ends."""
        with self._changed:
            for each in self.pending:
                each.is_awaited = True
            seconds = min(seconds, self._seconds_left)
            return self._changed.wait_for(lambda: any(p.has_begun or p.has_ended for p in self.pending), seconds)

    def abandon(self) -> None:
        """All of them, from any thread."""
        for each in self.pending:
            each.abandon()

    @property
    def has_begun(self) -> bool:
        """One of them."""
        return any(each.has_begun for each in self.pending)

    @property
    def has_ended(self) -> bool:
        """All of them."""
        return all(each.has_ended for each in self.pending)

    @property
    def num_waiting(self) -> int:
        """How many the engine has not begun with."""
        return sum(not (each.has_begun or each.has_ended) for each in self.pending)

    def _wait_for_news(self, pending: Collection[PendingGeneration], seconds: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: any(each.has_news for each in pending), seconds)

    @property
    def _seconds_left(self) -> float:
        """Until nobody waits for the engine any more."""
        return min(self.pending[0].deadline + OVERRUN_SECONDS - time.monotonic(), threading.TIMEOUT_MAX)


class Inbox:
    """Where generations wait until the step thread takes them in."""

    def __init__(
        self,
        max_tokens: int,
        *,
        is_queue: bool = False,
        block_keys: "Callable[[PreparedPrompt], BlockKeys | None]" = lambda _: None,
    ) -> None:
        """`is_queue` where the engine lets what is handed in wait for room, and tells when it begins with it;
        `block_keys` is called by who hands a prompt in."""
        self._block_keys = block_keys
        self.max_tokens = max_tokens
        self._is_queue = is_queue
        self._changed = threading.Condition()
        self._arrived: list[PendingGeneration] = []
        self._closed_by: Fault | HostFault | None = None
        self._is_woken = False

    def submit(
        self,
        prompt: "PreparedPrompt",
        sampling: SamplingOptions,
        *,
        priority: int = 0,
        deadline: float = inf,
        changed: threading.Condition | None = None,
        constraint: "Constraint | None" = None,
    ) -> PendingGeneration:
        """Hand in a prepared prompt; `priority` is how many steps below the highest, `deadline` is of `time.monotonic`,
        `changed` that of all `Generations` of a job. A `constraint` is this generation's alone.

        Raises `Fault` when it could never fit, however long it waited, and what the engine was closed with.
        """
        needed = len(prompt.input_ids) + sampling.max_new_tokens
        if needed > self.max_tokens:
            raise Fault(
                ErrorCode.PROMPT_TOO_LONG,
                f"Prompt and max_new_tokens need {needed} tokens, this worker holds {self.max_tokens} for one job. "
                "Shorten the text, or lower max_new_tokens, max_pixels, max_frames or fps.",
            )
        pending = PendingGeneration(prompt, sampling, priority, deadline, changed, constraint)
        pending.has_begun = not self._is_queue
        pending.block_keys = self._block_keys(prompt)
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
