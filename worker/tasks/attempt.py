"""One attempt at one job: media fetched and decoded, prompt prepared, answer generated. Writes no outcome."""

import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from math import inf
from pathlib import Path
from traceback import clear_frames
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from keye.config.codes import ErrorCode, Stage
from keye.config.event import FramesDecoded, StageStarted
from keye.config.faults import Fault
from keye.config.job import AnalysisJob, GenerationOptions, ImagePart, Priority, VideoPart
from keye.config.outcome import (
    Generation,
    JobResult,
    PartialText,
    StageTimings,
    TokenUsage,
)
from keye.worker.engine.inbox import Generated, PendingGeneration, SamplingOptions
from keye.worker.leases.claims import Claimed
from keye.worker.leases.job_lease import Interruption
from keye.worker.media.decoded import Decoded
from keye.worker.media.fetch.fetched import Identity
from keye.worker.media.job_media import decode, fetch
from keye.worker.model.checkpoint_files import read_generation
from keye.worker.results.event_writer import AttemptEvents, Coalescer
from keye.worker.results.thinking import part_text
from keye.worker.sizing import Sizing
from keye.worker.tasks.fault import CANCELLED_WHILE_RUNNING
from keye.worker.tasks.isolation import Isolation
from keye.worker.tasks.moves import log_stage
from keye.worker.tasks.turn import BRIEF_WAIT_SECONDS, Turn, Wanted
from keye.worker.tasks.visual_inputs import media_warnings, visual_inputs
from keye.worker.tasks.workbench import Workbench
from keye.worker.telemetry.log import about

if TYPE_CHECKING:
    from keye.worker.model.processor import PreparedPrompt

FRAMES_TOLD_EVERY_SECONDS = 0.5
# A shorter stage is told with what follows it: a job that is answered at once costs two round trips in all.
BRIEFLY_SECONDS = 0.01
# What an attempt is at: on its way to a decoder or to the prompt, waiting for something, being decoded and prepared, or
# generating.
Phase = Literal["fetch", Wanted, "decode", "running"]
# As many whole numbers as callers' JSON surely holds (RFC 8259, 6).
_NUM_SEEDS = 2**53


class LeaseLost(Exception):
    """Another attempt has the job now: whatever this one comes to is worth nothing."""


class Drained(Exception):
    """The process ends before the job does, and has given it back: another worker is to run it."""


def load_sampling(folder: Path) -> dict[str, Any]:
    """How the checkpoint samples where a job does not say, as `SamplingOptions` has it; what it leaves out is off."""
    written = read_generation(folder)
    sampling = {name: written[name] for name in ("top_p", "top_k", "repetition_penalty") if name in written}
    return sampling | {"temperature": written.get("temperature", 1.0) if written.get("do_sample") else 0.0}


def complete_sampling(options: GenerationOptions, defaults: dict[str, Any]) -> SamplingOptions:
    """The job's options, each one left out taken from the checkpoint, and a seed drawn, so that it can be told."""
    drawn = {"seed": secrets.randbelow(_NUM_SEEDS)}
    return SamplingOptions(**(defaults | drawn | options.model_dump(exclude_none=True)))


class Attempt:
    """`run` belongs to the delivery's thread; `interrupt` may come from any other.

    `stage` is the one it is in, `num_visual_tokens` what the prompt holds once it is built, `events` what it says of
    itself.
    """

    def __init__(self, bench: Workbench, job: AnalysisJob, lease: Claimed) -> None:
        self.stage = Stage.OPEN
        self.num_visual_tokens = 0
        self.events = AttemptEvents(bench.events, lease)
        self._turn = Turn(bench.events, lease, bench.lookahead.changed)
        self._bench = bench
        self.job = job
        self.lease = lease
        self._began_at = time.monotonic()
        left = lease.seconds_to_deadline
        self._deadline = inf if left is None else self._began_at + left
        self._limits: list[TimeLimit] = []
        self._seconds: dict[str, float] = {}
        self._frames_told_at = self._began_at
        self._interruption: Interruption | None = None
        self._pending: PendingGeneration | None = None
        self._had_begun = False

    @contextmanager
    def in_company(self, isolation: Isolation) -> Iterator[None]:
        """To `run` in: where its worker died once, waits for a place among few such, whatever limits say. Raises as
        `run` does."""
        if not self.lease.waits:
            yield
            return
        with isolation.in_company(self._stop_if_over):
            self._turn.come()
            yield

    def run(self) -> JobResult:
        """Raises `LeaseLost`, `Drained`, or whatever `fault.explain` makes a failure of."""
        try:
            return self._answer()
        except BaseException as error:
            # Others wait for the memory of pixels, which a traceback would hold until a search for cycles.
            self._had_begun, self._pending = self.is_in_engine, None
            clear_frames(error.__traceback__)
            raise

    def _answer(self) -> JobResult:
        parts = self.job.all_media()
        self._limits.append(TimeLimit("KEYE_MAX_ATTEMPT_SECONDS", self._bench.max_attempt_seconds, time.monotonic()))
        self._stop_if_over()
        sizing = self._sizing(parts)
        identities, decoded = self._read_media(parts, sizing) if parts else ([], [])
        with self._in_stage(Stage.PREPARE, is_brief=not parts):
            images, videos, seen = visual_inputs(sizing, parts, identities, decoded)
            prompt = self._bench.processor.prepare(_messages(self.job), images, videos, self.job.thinking.value)
            self._require_room(prompt)
            self.num_visual_tokens = prompt.num_visual_tokens
            if prompt.num_visual_tokens:
                # Its patches, which live until it has ended: a sequence that is preempted is encoded again.
                self._bench.decoders.keep(prompt, 3 * sizing.factor**2 * prompt.num_visual_tokens)
        warnings = media_warnings(decoded, self._bench.media_limits.min_frames_per_second) + self._memory_warning()
        # Their memory is another job's while this one generates, whatever frames of calls still know of these lists.
        for media in (decoded, images, videos):
            media.clear()
        with self._in_stage(Stage.GENERATE, is_brief=True):
            sampling = complete_sampling(self.job.generation, self._bench.sampling)
            generated = self._generate(prompt, sampling)
        if generated.has_cut_thinking:
            warnings += (f"Thinking was ended after {sampling.max_thinking_tokens} tokens (max_thinking_tokens).",)
        return JobResult(
            job_id=self.lease.job_id,
            **part_text(generated.text)._asdict(),
            raw_text=generated.text,
            finish_reason="length" if generated.finish_reason == "length" else "stop",
            usage=TokenUsage(
                prompt_tokens=generated.num_prompt_tokens,
                visual_tokens=prompt.num_visual_tokens,
                completion_tokens=len(generated.token_ids),
            ),
            timings=StageTimings(
                queued=self.lease.queued_seconds,
                total=self.seconds,
                first_token=generated.first_token_seconds,
                **self._seconds,
            ),
            media=seen,
            model=self._bench.model,
            worker=self._bench.worker,
            attempts=self.lease.attempt,
            warnings=warnings,
            metadata=self.job.metadata,
            generation=Generation(**asdict(sampling), thinking=self.job.thinking),
        )

    @property
    def phase(self) -> Phase:
        if self.stage is Stage.GENERATE:
            return "running" if self.is_in_engine else "engine"
        is_prepared = self.stage in (Stage.DECODE, Stage.PREPARE)
        return self._turn.waits_for or ("decode" if is_prepared else "fetch")

    @property
    def is_in_engine(self) -> bool:
        # Read once, here and in `interrupt`: other threads ask, and `run` lets go of it.
        pending = self._pending
        return self._had_begun if pending is None else pending.has_begun

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self._began_at

    @property
    def ends_at(self) -> float:
        """When it has to have ended, of time.monotonic()."""
        return min([self._deadline, *(limit.ends_at for limit in self._limits)])

    def interrupt(self, reason: Interruption) -> None:
        """The lease is lost, the caller cancels or the process ends.

        Preparing goes on to its end, all other stages stop at once.
        """
        self._interruption = reason
        if (pending := self._pending) is not None:
            pending.abandon()

    def _stop_if_over(self) -> None:
        match self._interruption:
            case "lost":
                raise LeaseLost
            case "drained":
                raise Drained
            case "cancelled":
                raise Fault(ErrorCode.CANCELLED, CANCELLED_WHILE_RUNNING, partial=self._text_so_far())
        if (fault := self.fault_of_time()) is not None:
            fault.partial = self._text_so_far()
            raise fault

    def fault_of_time(self) -> Fault | None:
        """What the job is told where its time is over; from any thread."""
        now = time.monotonic()
        if now >= self._deadline:
            where = "before its first stage" if self.stage is Stage.OPEN else f"in stage {self.stage.value}"
            given = self.job.deadline_seconds
            return Fault(
                ErrorCode.DEADLINE_EXCEEDED,
                f"The job's {'time was' if given is None else f'{given} s were'} over {where}; it was queued for "
                f"{self.lease.queued_seconds:.1f} s. Give a longer deadline_seconds (Celery: expires) or add workers.",
            )
        return next((limit.fault(self.stage, now) for limit in self._limits if now >= limit.ends_at), None)

    def _text_so_far(self) -> PartialText | None:
        """What the engine gave before it was stopped; None where it had not begun to write."""
        generated = self._pending.generated if self._pending is not None and self._pending.has_ended else None
        if generated is None or not generated.token_ids:
            return None
        parted = part_text(generated.text)._asdict()
        return PartialText(**parted, raw_text=generated.text, completion_tokens=len(generated.token_ids))

    @contextmanager
    def _in_stage(self, stage: Stage, is_brief: bool = False) -> Iterator[None]:
        self.stage = stage
        self._bench.lookahead.changed()
        self.events.tell(StageStarted, may_wait=is_brief, stage=stage)
        started_at = time.monotonic()
        with about(stage=stage):
            log_stage(self.lease, stage)
            yield
        self._seconds[stage.value] = time.monotonic() - started_at
        self._stop_if_over()

    def _sizing(self, parts: Sequence[ImagePart | VideoPart]) -> Sizing:
        """The model's rule for sizes, within what the context leaves for media beside the text and the answer."""
        processor, job = self._bench.processor, self.job
        # Of text alone there is nothing to share out, and a long one takes a second to count.
        num_text_tokens = processor.count_text_tokens(_messages(job), job.thinking.value) if parts else 0
        context = min(processor.config.max_position_embeddings, self._bench.inbox.max_tokens)
        room = context - job.generation.max_new_tokens - num_text_tokens
        if self.lease.max_visual_tokens is not None:
            room = min(room, self.lease.max_visual_tokens)
        return processor.sizing.share(parts, room)

    def _memory_warning(self) -> tuple[str, ...]:
        limit = self.lease.max_visual_tokens
        if limit is None:
            return ()
        return (
            f"The media were shown with {self.num_visual_tokens} visual tokens, {limit} at most: with more of them the "
            "attempt before did not fit into the device's memory. Send fewer, or lower max_pixels, max_frames or fps.",
        )

    def _read_media(
        self, parts: Sequence[ImagePart | VideoPart], sizing: Sizing
    ) -> tuple[list[Identity], list[Decoded]]:
        bench = self._bench
        with ExitStack() as opened:
            with self._in_stage(Stage.FETCH):
                fetched = fetch(parts, bench.media_limits, bench.media_cache, self._watch_fetching)
                # `decode` closes them, but the job may end before it.
                for medium in fetched:
                    opened.callback(medium.close)
            with self._in_stage(Stage.DECODE):
                turn = self._turn
                watching = (self._on_frame, self._watch_decoding, turn.wait, turn.begin, turn.end)
                decoded = decode(parts, fetched, bench.media_limits, sizing, bench.decoders, *watching)
                turn.begin()
                return [medium.identity for medium in fetched], decoded

    def _watch_fetching(self) -> None:
        self._stop_if_over()
        # Where it takes its time another may be taken.
        self._bench.lookahead.changed()

    def _watch_decoding(self) -> None:
        self._stop_if_over()
        self._turn.tell()

    def _on_frame(self, media_index: int, done: int, total: int) -> None:
        self._stop_if_over()
        now = time.monotonic()
        if done == total or now - self._frames_told_at >= FRAMES_TOLD_EVERY_SECONDS:
            self._frames_told_at = now
            self.events.tell(FramesDecoded, media_index=media_index, done=done, total=total)

    def _require_room(self, prompt: "PreparedPrompt") -> None:
        context = self._bench.processor.config.max_position_embeddings
        num_prompt_tokens, max_new_tokens = len(prompt.input_ids), self.job.generation.max_new_tokens
        if num_prompt_tokens + max_new_tokens > context:
            raise Fault(
                ErrorCode.PROMPT_TOO_LONG,
                f"The prompt has {num_prompt_tokens} tokens ({prompt.num_visual_tokens} of them visual) and "
                f"max_new_tokens is {max_new_tokens}; the model's context is {context}. "
                "Shorten the text, or lower max_new_tokens, max_pixels, max_frames or fps.",
            )

    def _generate(self, prompt: "PreparedPrompt", sampling: SamplingOptions) -> Generated:
        limit = TimeLimit("KEYE_MAX_GENERATE_SECONDS", self._bench.max_generate_seconds, time.monotonic())
        self._limits.append(limit)
        priority = list(Priority).index(self.job.priority)
        self._pending = self._bench.inbox.submit(prompt, sampling, priority=priority, deadline=self.ends_at)
        if self._interruption is not None:
            # It came before there was anything to abandon.
            self._pending.abandon()
        try:
            if not self._pending.wait(BRIEFLY_SECONDS):
                self.events.flush()
                self._await_turn(self._pending)
            self._bench.lookahead.begun(self)
            text = Coalescer(self.events)
            for delta in self._pending.deltas():
                text.push(delta.text, delta.num_tokens, is_last=self._pending.has_ended)
        except BaseException:
            # Nobody is left to read what the engine would go on to write.
            self._pending.abandon()
            raise
        text.flush()
        self._stop_if_over()
        generated = self._pending.generated
        if generated.finish_reason in ("abandoned", "deadline"):
            raise RuntimeError(f"the engine gave the generation up ({generated.finish_reason}), nobody asked it to")
        return generated

    def _await_turn(self, pending: PendingGeneration) -> None:
        """Until the engine has room for it, or it is over."""
        self._turn.wait("engine")
        if not pending.wait_to_begin(BRIEF_WAIT_SECONDS):
            self._turn.tell(after_seconds=0)
            pending.wait_to_begin()
        self._turn.begin()


def _messages(job: AnalysisJob) -> list[dict[str, Any]]:
    """The conversation as the checkpoint's template reads it: media are placeholders, in order."""
    return [
        {
            "role": message.role,
            "content": message.content
            if isinstance(message.content, str)
            else [part.model_dump(include={"type", "text"}) for part in message.content],
        }
        for message in job.conversation()
    ]


class TimeLimit(NamedTuple):
    """`seconds` from `began_at`, a time.monotonic(), as `setting` has it."""

    setting: str
    seconds: float
    began_at: float

    @property
    def ends_at(self) -> float:
        return self.began_at + self.seconds

    def fault(self, stage: Stage, now: float) -> Fault:
        """Of an attempt that is in `stage` still."""
        return Fault(
            ErrorCode.TIME_LIMIT_EXCEEDED,
            f"The job was stopped in stage {stage.value} after {now - self.began_at:.1f} s, the limit is "
            f"{self.seconds:g} s ({self.setting}). Ask for less (max_new_tokens, media, frames), or raise the limit.",
        )
