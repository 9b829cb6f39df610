"""The answers that a job is due: what the engine is asked for each of them, how they come, and what the result tells.

One that cannot be given costs the others nothing.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from keye.config.codes import ErrorCode
from keye.config.event import AnswerEnded
from keye.config.faults import Fault
from keye.config.job import AnalysisJob, Priority
from keye.config.outcome import Answer, Generation, PartialText, TokenLogprob, TokenUsage, Unanswered
from keye.worker.engine.inbox import Generated, Generations, PendingGeneration, SamplingOptions
from keye.worker.host_fault import HostFault, host_fault_of
from keye.worker.results.event_writer import AttemptEvents, Coalescer
from keye.worker.results.parsed_answer import parse_answer
from keye.worker.results.thinking import AnswerForm, PartedText, answer_form, part_text
from keye.worker.tasks.fault import explain
from keye.worker.tasks.sampling import complete_sampling
from keye.worker.tasks.workbench import Workbench

if TYPE_CHECKING:
    from keye.worker.engine.constraint import Constraint
    from keye.worker.model.processor import KeyeProcessor, PreparedMedia, PreparedPrompt

log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class DueAnswer:
    """One sample of one question; `job` is the attempt's, as if that were all it asks.

    It is given a `prompt`, then a `pending` generation, and in the end an `outcome`, as early as it fails.
    """

    question: int
    sample: int
    job: AnalysisJob
    sampling: SamplingOptions
    prompt: "PreparedPrompt" = field(init=False)
    constraint: "Constraint | None" = None
    pending: PendingGeneration | None = None
    outcome: Generated | Fault | None = None
    parsed: Any = None

    @property
    def form(self) -> AnswerForm:
        return answer_form(self.job.response_schema, self.job.thinking.value)

    def parted(self, generated: Generated) -> PartedText:
        return part_text(generated.text, self.form)


class Answers:
    """Question by question, sample by sample. All but `abandon` and the counts is for the attempt's thread."""

    def __init__(self, bench: Workbench, job: AnalysisJob) -> None:
        self._bench = bench
        self._job = job
        self._asked = job.by_question()
        self._due = [
            DueAnswer(question, sample, asked, sampling)
            for question, asked in enumerate(self._asked)
            for sample, sampling in enumerate(complete_sampling(asked.generation, bench.sampling))
        ]
        self.are_several = bool(job.questions) or len(self._due) > 1
        self._running: list[DueAnswer] = []
        self._generations: Generations | None = None

    def num_tokens(self, context: int, check: Callable[[], None]) -> int:
        """What the longest text and its answer take of so many tokens; `check` raises once it is over.

        A question that leaves no room at all fails, and does not have the media of the others shown smaller.
        """
        needed = []
        for each in self._asked:
            num_tokens = self._bench.processor.count_text_tokens(messages_of(each), each.thinking.value)
            needed.append(num_tokens + each.generation.max_new_tokens)
            check()
        return max((each for each in needed if each < context), default=max(needed))

    def prepare(self, media: "PreparedMedia", check: Callable[[], None]) -> int:
        """Build the prompts, and return how many visual tokens each has; `check` as before."""
        num_visual_tokens = 0
        for pixels in (media.pixel_values, media.pixel_values_videos):
            if pixels is not None:
                # They live until the last answer has ended: a sequence that is preempted is encoded again.
                self._bench.decoders.keep(pixels, pixels.nbytes)
        for question, asked in enumerate(self._asked):
            samples = [each for each in self._due if each.question == question]
            with self._apart(samples):
                prompt = self._bench.processor.prepare_text(messages_of(asked), media, asked.thinking.value)
                num_visual_tokens = prompt.num_visual_tokens
                _require_room(self._bench.processor, prompt, asked.generation.max_new_tokens)
                constraint = _constraint(self._bench.processor, asked)
                for each in samples:
                    each.prompt = prompt
                    each.constraint = constraint and constraint.copy()
            check()
        self._require_one()
        return num_visual_tokens

    def submit(self, deadline: float) -> Generations:
        """Hand all of them to the engine, at once."""
        inbox, changed = self._bench.inbox, threading.Condition()
        options: dict[str, Any] = {"priority": list(Priority).index(self._job.priority), "deadline": deadline}
        submitted: list[PendingGeneration] = []
        for each in self._due:
            if each.outcome is None:
                with self._apart([each]):
                    each.pending = inbox.submit(
                        each.prompt, each.sampling, changed=changed, constraint=each.constraint, **options
                    )
                    submitted.append(each.pending)
                    self._running.append(each)
        self._require_one()
        self._generations = Generations(submitted)
        return self._generations

    def read(self, generations: Generations, events: AttemptEvents) -> Iterator[None]:
        """Tell the texts as they are written, and the end of each; ends with the last.

        Raises the `Fault` of the only answer, or of the first where none could be given, and a `HostFault` at once.
        """
        for each in self._due:
            if isinstance(each.outcome, Fault):
                _tell_end(each, events, may_wait=True)
        texts = [
            Coalescer(events, each.form, question=each.question, sample=each.sample, num_answers=len(self._running))
            for each in self._running
        ]
        for place, delta, has_ended in generations.deltas():
            is_last = generations.has_ended
            texts[place].push(delta.text, delta.num_tokens, is_last)
            if has_ended:
                answer = self._running[place]
                self._end(answer, generations.pending[place])
                if self.are_several:
                    texts[place].flush()
                    _tell_end(answer, events, may_wait=is_last)
            yield
        for text in texts:
            text.flush()
        self._require_one()

    def abandon(self) -> None:
        """From any thread, those that were submitted."""
        for each in self._due:
            if each.pending is not None:
                each.pending.abandon()

    @property
    def has_begun(self) -> bool:
        """The engine has, with one of them."""
        return self._generations is not None and self._generations.has_begun

    @property
    def num_waiting(self) -> int:
        """How many the engine has not begun with."""
        return len(self._due) if self._generations is None else self._generations.num_waiting

    def text_so_far(self) -> PartialText | None:
        """Of the first that had begun to write when it was stopped."""
        for each in self._due:
            if each.pending is None or not each.pending.has_ended or each.pending.fault is not None:
                continue
            if (generated := each.pending.generated).token_ids:
                parted = each.parted(generated)._asdict()
                return PartialText(**parted, raw_text=generated.text, completion_tokens=len(generated.token_ids))
        return None

    def told(self) -> dict[str, Any]:
        """Fields of the `JobResult`, once all have ended: the first answer, and what all of them used."""
        answers = [_told(each, self._bench.processor) for each in self._due]
        answered = [answer for answer in answers if isinstance(answer, Answer)]
        names = ("answer", "analysis", "reasoning", "raw_text", "finish_reason", "generation", "parsed", "logprobs")
        used = {name: sum(getattr(each.usage, name) for each in answered) for name in TokenUsage.model_fields}
        return {
            **{name: getattr(answered[0], name) for name in names},
            "usage": TokenUsage(**used),
            "answers": tuple(answers) if self.are_several else (),
        }

    @property
    def first_token_seconds(self) -> float | None:
        """Until the first of all."""
        seconds = [each.outcome.first_token_seconds for each in self._due if isinstance(each.outcome, Generated)]
        return min((each for each in seconds if each is not None), default=None)

    def warnings(self) -> tuple[str, ...]:
        """What their options led to, each told once."""
        told: dict[str, None] = {}
        for each in self._due:
            if each.sample and not each.sampling.temperature:
                told["All samples (n) are the same: this checkpoint is greedy. Give a temperature."] = None
            if isinstance(each.outcome, Generated) and each.outcome.has_cut_thinking:
                most = each.sampling.max_thinking_tokens
                told[f"Thinking was ended after {most} tokens (max_thinking_tokens)."] = None
        return tuple(told)

    @contextmanager
    def _apart(self, samples: Sequence[DueAnswer]) -> Iterator[None]:
        """What fails within costs these alone, unless they are all there is, or its host is to blame."""
        try:
            yield
        except Exception as error:
            if not self.are_several or host_fault_of(error) is not None:
                raise
            fault = explain(error)
            if fault.code is ErrorCode.INTERNAL:
                log.exception("a fault of the worker with question %d", samples[0].question)
            for each in samples:
                each.outcome = fault

    def _end(self, answer: DueAnswer, pending: PendingGeneration) -> None:
        if isinstance(pending.fault, HostFault) or (pending.fault is not None and not self.are_several):
            raise pending.fault
        answer.outcome = pending.fault or pending.generated
        schema = answer.job.response_schema
        generated = answer.outcome
        if schema is not None and isinstance(generated, Generated) and generated.finish_reason in ("stop", "length"):
            with self._apart([answer]):
                answer.parsed = parse_answer(schema, answer.parted(generated).answer)

    def _require_one(self) -> None:
        """Raises why the first cannot be given, once none can be."""
        faults = [each.outcome for each in self._due if isinstance(each.outcome, Fault)]
        if len(faults) == len(self._due):
            raise faults[0]


def _tell_end(answer: DueAnswer, events: AttemptEvents, may_wait: bool) -> None:
    code = answer.outcome.code if isinstance(answer.outcome, Fault) else None
    facts = {"question": answer.question, "sample": answer.sample, "num_tokens_of_all": events.num_tokens}
    events.tell(AnswerEnded, may_wait, code=code, **facts)


def _require_room(processor: "KeyeProcessor", prompt: "PreparedPrompt", max_new_tokens: int) -> None:
    context, num_prompt_tokens = processor.config.max_position_embeddings, len(prompt.input_ids)
    if num_prompt_tokens + max_new_tokens > context:
        raise Fault(
            ErrorCode.PROMPT_TOO_LONG,
            f"The prompt has {num_prompt_tokens} tokens ({prompt.num_visual_tokens} of them visual) and "
            f"max_new_tokens is {max_new_tokens}; the model's context is {context}. "
            "Shorten the text, or lower max_new_tokens, max_pixels, max_frames or fps.",
        )


def _constraint(processor: "KeyeProcessor", job: AnalysisJob) -> "Constraint | None":
    if job.response_schema is None:
        return None
    # It brings llguidance along, which jobs without a schema have no use for.
    from keye.worker.engine.constraint import Constraint

    return Constraint.of(processor, job.response_schema, job.thinking.value, job.generation.max_new_tokens)


def messages_of(job: AnalysisJob) -> list[dict[str, Any]]:
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


def _told(due: DueAnswer, processor: "KeyeProcessor") -> Answer | Unanswered:
    generated = due.outcome
    if isinstance(generated, Fault):
        return Unanswered(question=due.question, sample=due.sample, code=generated.code, message=generated.message)
    if generated is None or generated.finish_reason in ("abandoned", "deadline"):
        raise RuntimeError("the engine gave a generation up, nobody asked it to")
    return Answer(
        question=due.question,
        sample=due.sample,
        **due.parted(generated)._asdict(),
        parsed=due.parsed,
        raw_text=generated.text,
        finish_reason=generated.finish_reason,
        usage=TokenUsage(
            prompt_tokens=generated.num_prompt_tokens,
            visual_tokens=due.prompt.num_visual_tokens,
            completion_tokens=len(generated.token_ids),
            cached_tokens=generated.num_cached_tokens,
        ),
        first_token_seconds=generated.first_token_seconds,
        generation=Generation(**asdict(due.sampling), thinking=due.job.thinking),
        logprobs=tuple(_logprobs(generated, processor)) if due.sampling.logprobs else None,
    )


def _logprobs(generated: Generated, processor: "KeyeProcessor") -> Iterator[TokenLogprob]:
    for token_id, logprob in zip(generated.token_ids, generated.logprobs, strict=True):
        # More digits than float32 has would only make it longer.
        token = str(processor.tokenizer.decode([token_id]))
        yield TokenLogprob(token_id=token_id, token=token, logprob=round(logprob, 6))
