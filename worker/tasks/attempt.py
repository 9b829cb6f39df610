"""One attempt at one job: media fetched and decoded, prompt prepared, answer generated. Writes no outcome."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from math import inf
from traceback import clear_frames
from typing import Literal, NamedTuple

from keye.config.codes import ErrorCode, Stage
from keye.config.event import FramesDecoded, StageStarted
from keye.config.faults import Fault
from keye.config.job import AnalysisJob, ImagePart, VideoPart
from keye.config.outcome import JobResult, PartialText, StageTimings
from keye.worker.engine.inbox import Generations
from keye.worker.leases.claims import Claimed
from keye.worker.leases.job_lease import Interruption
from keye.worker.media.decoded import Decoded
from keye.worker.media.fetch.fetched import Identity
from keye.worker.media.job_media import decode, fetch
from keye.worker.results.event_writer import AttemptEvents
from keye.worker.sizing import Sizing
from keye.worker.tasks.answers import Answers
from keye.worker.tasks.fault import CANCELLED_WHILE_RUNNING
from keye.worker.tasks.isolation import Isolation
from keye.worker.tasks.moves import log_stage
from keye.worker.tasks.turn import BRIEF_WAIT_SECONDS, Turn, Wanted
from keye.worker.tasks.visual_inputs import media_warnings, visual_inputs
from keye.worker.tasks.workbench import Workbench
from keye.worker.telemetry.log import about

FRAMES_TOLD_EVERY_SECONDS = 0.5
# A shorter stage is told with what follows it: a job that is answered at once costs two round trips in all.
BRIEFLY_SECONDS = 0.01
# What an attempt is at: on its way to a decoder or to the prompt, waiting for something, being decoded and prepared, or
# generating.
Phase = Literal["fetch", Wanted, "decode", "running"]


class LeaseLost(Exception):
    """Another attempt has the job now: whatever this one comes to is worth nothing."""


class Drained(Exception):
    """The process ends before the job does, and has given it back: another worker is to run it."""


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
        self._answers: Answers | None = None
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
        self._answers = Answers(self._bench, self.job)
        try:
            return self._answer(self._answers)
        except BaseException as error:
            # Others wait for the memory of pixels, which a traceback would hold until a search for cycles.
            self._had_begun, self._answers = self.is_in_engine, None
            clear_frames(error.__traceback__)
            raise

    def _answer(self, answers: Answers) -> JobResult:
        parts = self.job.all_media()
        self._limits.append(TimeLimit("KEYE_MAX_ATTEMPT_SECONDS", self._bench.max_attempt_seconds, time.monotonic()))
        self._stop_if_over()
        sizing = self._sizing(parts, answers)
        identities, decoded = self._read_media(parts, sizing) if parts else ([], [])
        with self._in_stage(Stage.PREPARE, is_brief=not parts):
            images, videos, seen = visual_inputs(sizing, parts, identities, decoded)
            prepared = self._bench.processor.prepare_media(images, videos)
            self.num_visual_tokens = answers.prepare(prepared, self._stop_if_over)
        warnings = media_warnings(decoded, self._bench.media_limits.min_frames_per_second) + self._memory_warning()
        # Their memory is another job's while this one generates, whatever frames of calls still know of these lists.
        for media in (decoded, images, videos):
            media.clear()
        with self._in_stage(Stage.GENERATE, is_brief=True):
            self._generate(answers)
        return JobResult(
            job_id=self.lease.job_id,
            **answers.told(),
            timings=StageTimings(
                queued=self.lease.queued_seconds,
                total=self.seconds,
                first_token=answers.first_token_seconds,
                **self._seconds,
            ),
            media=seen,
            model=self._bench.model,
            worker=self._bench.worker,
            attempts=self.lease.attempt,
            warnings=warnings + answers.warnings(),
            metadata=self.job.metadata,
        )

    @property
    def phase(self) -> Phase:
        if self.stage is Stage.GENERATE:
            return "engine" if self.num_waiting else "running"
        is_prepared = self.stage in (Stage.DECODE, Stage.PREPARE)
        return self._turn.waits_for or ("decode" if is_prepared else "fetch")

    @property
    def is_in_engine(self) -> bool:
        # Read once, here and in `interrupt`: other threads ask, and `run` lets go of it.
        answers = self._answers
        return self._had_begun if answers is None else answers.has_begun

    @property
    def num_waiting(self) -> int:
        """How many generations it has for the engine that are not begun."""
        answers = self._answers
        return 0 if answers is None else answers.num_waiting

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
        if (answers := self._answers) is not None:
            answers.abandon()

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
        return None if self._answers is None else self._answers.text_so_far()

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

    def _sizing(self, parts: Sequence[ImagePart | VideoPart], answers: Answers) -> Sizing:
        """The model's rule for sizes, within what the context leaves for media beside the text and the answer."""
        processor = self._bench.processor
        context = min(processor.config.max_position_embeddings, self._bench.inbox.max_tokens)
        # Of text alone there is nothing to share out, and a long one takes a second to count.
        room = context - answers.num_tokens(context, self._stop_if_over) if parts else context
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

    def _generate(self, answers: Answers) -> None:
        limit = TimeLimit("KEYE_MAX_GENERATE_SECONDS", self._bench.max_generate_seconds, time.monotonic())
        self._limits.append(limit)
        try:
            generations = answers.submit(self.ends_at)
            if self._interruption is not None:
                # It came before there was anything to abandon.
                answers.abandon()
            if not generations.wait(BRIEFLY_SECONDS):
                self.events.flush()
                self._await_turn(generations)
            is_ahead = self._is_ahead(generations)
            for _ in answers.read(generations, self.events):
                is_ahead = is_ahead and self._is_ahead(generations)
        except BaseException:
            # Nobody is left to read what the engine would go on to write.
            answers.abandon()
            raise
        self._stop_if_over()

    def _await_turn(self, generations: Generations) -> None:
        """Until the engine has room for one of them, or it is over."""
        self._turn.wait("engine")
        if not generations.wait_to_begin(BRIEF_WAIT_SECONDS):
            self._turn.tell(after_seconds=0)
            generations.wait_to_begin()
        self._turn.begin()

    def _is_ahead(self, generations: Generations) -> bool:
        """Whether some of it still waits for the engine; the door is told how far it is."""
        if generations.num_waiting:
            self._bench.lookahead.changed()
            return True
        self._bench.lookahead.begun(self)
        return False


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
