"""The engine: one thread that steps all running sequences together. A step is drain, plan, run, choose, apply."""

import logging
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import replace
from functools import partial
from typing import TypeVar

import numpy as np
import torch

from keye.config.codes import ErrorCode
from keye.config.faults import Fault
from keye.worker.engine.block_keys import BlockKeys
from keye.worker.engine.block_pool import BlockPool
from keye.worker.engine.detokenizer import TokenBytes
from keye.worker.engine.inbox import Inbox, PendingGeneration, SamplingOptions
from keye.worker.engine.memory import MemoryLimits, block_bytes, count_blocks, row_bytes
from keye.worker.engine.model_runner import ModelRunner
from keye.worker.engine.sampler import Sampler
from keye.worker.engine.scheduler import Scheduler
from keye.worker.engine.sequence import Sequence
from keye.worker.engine.snapshot import EngineSnapshot
from keye.worker.engine.step_plan import Chunk, StepLimits
from keye.worker.engine.thinking_budget import ThinkingTags
from keye.worker.engine.token_masks import TokenMasks
from keye.worker.engine.visual_rows import visual_rows
from keye.worker.host_fault import HostFault, host_fault_of
from keye.worker.model.attention_choice import choose_attention
from keye.worker.model.configuration_keye import KeyeConfig
from keye.worker.model.device_faults import is_device_lost, is_out_of_memory
from keye.worker.model.image_processing import Image, Video
from keye.worker.model.keye import KeyeForConditionalGeneration
from keye.worker.model.paged_attention import KVCache
from keye.worker.model.positions import PlaceholderMismatch
from keye.worker.model.processor import KeyeProcessor, PreparedPrompt
from keye.worker.telemetry import tell_warnings

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

DEFAULT_LIMITS = StepLimits()


class Engine:
    """Steps `model` and keeps at most `kv_cache_bytes` of keys and values for it.

    `block_size` None is what suits the device's attention. Raises as `choose_attention` does.
    """

    def __init__(
        self,
        model: KeyeForConditionalGeneration,
        processor: KeyeProcessor,
        *,
        kv_cache_bytes: int,
        block_size: int | None = None,
        limits: StepLimits = DEFAULT_LIMITS,
    ) -> None:
        config = model.config
        context = config.max_position_embeddings
        self.attention = choose_attention(config, model.dtype, model.device)
        model.visual.vision_model.item_form = self.attention.items
        paged = self.attention.paged
        block_size = block_size or paged.block_size
        each = block_bytes(config, block_size, model.dtype)
        num_blocks = count_blocks(kv_cache_bytes, each, context, block_size, limits.max_running)
        if num_blocks < 1:
            raise ValueError(f"{kv_cache_bytes} bytes are not enough for one block of {block_size} tokens")
        self.inbox = Inbox(
            max_tokens=min(context, num_blocks * block_size),
            is_queue=True,
            block_keys=partial(_block_keys, config, block_size),
        )
        self._processor = processor
        self._token_bytes = TokenBytes(processor.tokenizer)
        self._thinking_tags = ThinkingTags.of(processor.tokenizer)
        self._limits = MemoryLimits(limits)
        self._scheduler = Scheduler(BlockPool(num_blocks, block_size), limits)
        self._cache = KVCache(config, num_blocks, block_size, model.dtype, model.device)
        self._runner = ModelRunner(model, self._cache, paged, row_bytes(kv_cache_bytes))
        self._sampler = Sampler()
        self._masks = TokenMasks()
        self._is_stopping = False
        self.is_alive = True
        """False once the step thread died of a fault: it does not come back, the process should end."""
        self._step_began_at: float | None = None
        self._counters = EngineSnapshot()
        self._thread = threading.Thread(target=self._step_until_stopped, name="engine-steps", daemon=True)
        logger.info("attention: %s; room for %d tokens", self.attention.name, num_blocks * block_size)

    @property
    def seconds_in_step(self) -> float:
        """How long the step that runs now has taken; 0 between steps."""
        began_at = self._step_began_at
        return 0.0 if began_at is None else time.monotonic() - began_at

    def snapshot(self) -> EngineSnapshot:
        """From any thread."""
        pool, running = self._scheduler.pool, tuple(self._scheduler.running)
        limits = self._limits.now
        return replace(
            self._counters,
            running=len(running),
            max_running=limits.max_running,
            waiting=len(self._scheduler.waiting),
            unread_tokens=sum(sequence.num_uncached for sequence in running if not sequence.is_decoding),
            max_step_tokens=limits.max_step_tokens,
            blocks_used=pool.num_blocks - pool.num_free,
            num_blocks=pool.num_blocks,
        )

    def start(self) -> None:
        self._thread.start()

    def warm_up(self) -> None:
        """Generate a few tokens about a grey image and a grey video, so that no job pays for first times.

        Raises `Fault` when even that fails.
        """
        content = [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "What is this?"}]
        grey = np.full((2, 112, 112, 3), 128, np.uint8)
        messages = [{"role": "user", "content": content}]
        prompt = self._processor.prepare(messages, images=[Image(grey[0])], videos=[Video(grey)])
        for _ in self.inbox.submit(prompt, SamplingOptions(max_new_tokens=4)).deltas():
            pass

    def stop(self) -> None:
        """End the step thread and let go of all that is on the device but the model, which others may hold.

        Generations that have not ended come out as abandoned. To drain, wait for them first.
        """
        self._is_stopping = True
        self.inbox.wake()
        self._thread.join()
        self._runner.let_go()
        self._cache.let_go()
        self._sampler = Sampler()

    def _step_until_stopped(self) -> None:
        fault: HostFault | None = None
        tell_warnings()
        try:
            with torch.inference_mode():
                self._runner.capture_decoding(self._scheduler.limits.max_running)
                while not self._is_stopping:
                    if self._scheduler.is_idle:
                        self.inbox.wait()
                    self._step_began_at = time.monotonic()
                    self._step()
                    self._step_began_at = None
        except BaseException as error:
            logger.exception("the step thread died")
            self.is_alive = False
            # Its device is lost, as a rule; the jobs may well run in another process.
            fault = HostFault(f"the engine died of {type(error).__name__}: {error}", is_final=True)
        for pending in self.inbox.close(fault or Fault(ErrorCode.INTERNAL, "The engine has been stopped.")):
            self._take_in(pending)
        for sequence in list(self._scheduler):
            if fault is None:
                sequence.end("abandoned", time.monotonic())
            else:
                sequence.pending.end(fault)

    def _step(self) -> None:
        tell_warnings()
        for pending in self.inbox.drain():
            self._take_in(pending)
        started_at = time.monotonic()
        for sequence in [s for s in self._scheduler if s.is_given_up(started_at)]:
            self._leave(sequence)
            sequence.end("abandoned" if sequence.pending.is_abandoned else "deadline", started_at)
        self._scheduler.limits = self._limits.now
        plan = self._scheduler.start_step()
        if self._scheduler.unproven:
            self._cache.wipe(self._scheduler.unproven)
            self._scheduler.unproven.clear()
        for sequence in plan.preempted:
            self._runner.forget_media(sequence)
        for sequence in plan.admitted:
            if sequence.started_at is None:
                sequence.started_at = started_at
                sequence.num_cached_tokens = sequence.num_cached
            sequence.pending.begin()
        unseen = [chunk for chunk in plan.chunks if self._runner.needs_encoding(chunk)]
        if unseen:
            self._isolated(self._runner.encode, unseen, can_shorten=False)
        chunks = [chunk for chunk in plan.chunks if not chunk.sequence.pending.has_ended]
        if chunks:
            for computed, token_ids in self._isolated(self._next_tokens, chunks, can_shorten=True):
                self._apply(computed, token_ids, time.monotonic())
            self._counters.steps += 1
            self._limits.count_step()
        self._counters.preemptions += len(plan.preempted)
        self._counters.step_seconds += time.monotonic() - started_at

    def _take_in(self, pending: PendingGeneration) -> None:
        if pending.sampling.max_thinking_tokens is not None and self._thinking_tags is None:
            message = "max_thinking_tokens counts between <think> and </think>, which are no tokens of this model's."
            pending.end(Fault(ErrorCode.INVALID_JOB, f"{message} Leave it out, or lower max_new_tokens."))
            return
        eos_token_ids = self._processor.eos_token_ids
        self._scheduler.add(Sequence(pending, self._token_bytes, eos_token_ids, self._thinking_tags))

    def _next_tokens(self, chunks: Seq[Chunk]) -> list[int | None]:
        """The next token of each sequence whose end its chunk reaches."""
        ending = [chunk.sequence for chunk in chunks if chunk.reaches_end]
        masks = self._masks.begin(ending)
        return self._sampler.choose(self._runner.run(chunks), ending, masks)

    def _apply(self, chunks: Seq[Chunk], token_ids: Seq[int | None], now: float) -> None:
        next_token_ids = iter(token_ids)
        for sequence, num_tokens in chunks:
            if not sequence.is_decoding:
                self._counters.prefill_tokens += num_tokens
            sequence.num_cached += num_tokens
            if sequence.num_uncached:
                continue
            token_id = next(next_token_ids)
            if token_id is None:
                self._runner.distrust_media(sequence)
                message = "The model's numbers overflowed. Run it at another precision."
                self._fail(sequence, sequence.unfit(None) or Fault(ErrorCode.INTERNAL, message))
                continue
            self._runner.forget_media(sequence)
            self._scheduler.publish(sequence)
            try:
                reason = sequence.append(token_id, now)
                fault = sequence.unfit(reason)
            except Exception as error:
                fault = _own_fault(error)
            if fault is not None:
                self._fail(sequence, fault)
                continue
            if sequence.generated_ids[-1] != token_id:
                # It took note of the other as seen.
                self._sampler.forget_batch()
            if reason:
                self._leave(sequence)
                sequence.end(reason, now)

    def _isolated(
        self, compute: Callable[[Seq[Chunk]], Result], chunks: Seq[Chunk], *, can_shorten: bool
    ) -> list[tuple[Seq[Chunk], Result]]:
        """Compute the chunks together. If that fails, in halves, so that only the sequence to blame fails; where
        memory ran out, first with what was kept for prompts to come.

        `can_shorten` lets a chunk that is alone and still too large for the memory be halved itself; what is left of
        it is planned again in the next step.
        """
        try:
            return [(chunks, compute(chunks))]
        except Exception as error:
            if is_device_lost(error):
                raise  # And every sequence with it.
            is_memory = is_out_of_memory(error)
            has_made_room = is_memory and self._runner.make_room()
            sequence, num_tokens = chunks[0]
            if has_made_room:
                parts = [chunks]
            elif len(chunks) > 1:
                parts = [chunks[: len(chunks) // 2], chunks[len(chunks) // 2 :]]
            elif is_memory and can_shorten and num_tokens > 1:
                parts = [[Chunk(sequence, num_tokens // 2)]]
            elif is_memory:
                logger.warning("a sequence of %d tokens fails, alone: %s", sequence.num_tokens, error)
                self._fail(sequence, Fault(ErrorCode.OUT_OF_MEMORY, self._runner.why_too_large(chunks[0])))
                return []
            elif (host_fault := host_fault_of(error)) is not None:
                # Kernels are compiled when they are first run, which takes files and processes.
                logger.warning("a sequence meets a fault of this host: %s", host_fault)
                self._fail(sequence, host_fault)
                return []
            else:
                self._fail(sequence, _own_fault(error))
                return []
            if is_memory and not has_made_room:
                self._counters.out_of_memory += 1
                self._limits.lower(sum(chunk.num_tokens for chunk in chunks) // 2)
        # Not before the error is gone: its traceback holds the tensors of the failed attempt.
        if is_memory:
            torch.cuda.empty_cache()  # Libraries such as cuBLAS find no room in what torch keeps for itself.
        return [result for part in parts for result in self._isolated(compute, part, can_shorten=can_shorten)]

    def _fail(self, sequence: Sequence, fault: Fault | HostFault) -> None:
        self._leave(sequence, has_failed=True)
        sequence.pending.end(fault)

    def _leave(self, sequence: Sequence, *, has_failed: bool = False) -> None:
        self._scheduler.remove(sequence, has_failed=has_failed)
        self._runner.forget_media(sequence)
        self._sampler.forget_batch()


def _own_fault(error: Exception) -> Fault:
    logger.exception("a sequence failed")
    message = f"The model failed on this job with {type(error).__name__}. The worker's log has the traceback."
    return Fault(ErrorCode.INTERNAL, message)


def _block_keys(config: KeyeConfig, block_size: int, prompt: PreparedPrompt) -> BlockKeys | None:
    try:
        return BlockKeys(prompt, visual_rows(prompt, config).values(), block_size)
    except PlaceholderMismatch:
        return None  # Its sequence fails of it.
