"""A client for tests of programs that ask: no Redis and no worker, and jobs that end as the test says."""

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import JsonValue

from keye.config import keys
from keye.config.codes import ErrorCode, JobState, QueuedAgain, Stage
from keye.config.event import AnswerEnded, Event, FramesDecoded, StageStarted, TextGenerated
from keye.config.job import AnalysisJob
from keye.config.outcome import (
    Answer,
    Generation,
    JobFailure,
    JobResult,
    ModelIdentity,
    StageTimings,
    TokenLogprob,
    TokenUsage,
    Unanswered,
    WorkerIdentity,
)
from keye.config.settings import ProducerSettings
from keye.config.wire import SealedJob
from keye.producer.async_client import AsyncJob
from keye.producer.client import Client
from keye.producer.job import Job
from keye.producer.memory import MemoryTransport

# A code is in the place of an answer; of several answers a list has each, and one alone is that of all.
Said = str | ErrorCode | Sequence[str | ErrorCode]
Reply = Callable[[AnalysisJob], Said | None]


class MemoryClient(Client):
    """A `Client` that keeps jobs in this process; `AsyncClient(MemoryClient())` is the same for asyncio.

    >>> client = MemoryClient(lambda job: "a cat" if job.media else ErrorCode.INVALID_JOB)
    >>> client.submit(prompt="What is it?", media=["s3://photos/1.jpg"]).result().answer
    'a cat'

    Each job ends at once as `reply` says, with an answer or a code, or of `questions` and `n` answers with a list of
    these; where it says None, or there is none, the job waits for the test: `start`, `decode`, `write`, then `answer`
    or `fail`. Where a job has a `response_schema`, an answer is the text that fits. Settings are the defaults, whatever
    the environment says. There are no dead letters and no quarantine.
    """

    def __init__(self, reply: Reply | None = None, max_queue_depth: int | None = None) -> None:
        self._settings = ProducerSettings.model_construct()
        self._memory = self._transport = MemoryTransport(self._reply, max_queue_depth)
        self._replies = reply

    @property
    def jobs(self) -> list[Job]:
        """All that were submitted, in their order."""
        return [self.job(job_id) for job_id in list(self._memory.records)]

    def asked(self, job: Job | AsyncJob) -> AnalysisJob:
        """What the job asks for."""
        return SealedJob.model_validate_json(self._memory.record(job.id)["sealed"]).job

    def start(self, job: Job | AsyncJob, stage: Stage = Stage.GENERATE) -> None:
        """A worker has taken the job, and is at this stage."""
        record = self._memory.record(job.id)
        if record["state"] == JobState.QUEUED:
            self._move(job, JobState.RUNNING, attempts=str(int(record["attempts"]) + 1), claimed_at=str(time.time()))
        self._say(job, StageStarted(stage=stage, attempt=self._attempt(job), at=time.time()))

    def decode(self, job: Job | AsyncJob, done: int, total: int, media_index: int = 0) -> None:
        """So many frames of a video are decoded."""
        attempt = self._attempt(job)
        self._say(job, FramesDecoded(media_index=media_index, done=done, total=total, attempt=attempt, at=time.time()))

    def write(
        self, job: Job | AsyncJob, text: str, channel: str = "answer", question: int = 0, sample: int = 0
    ) -> None:
        """The next text of the answer, the reasoning or the analysis, a token a word; of several answers, of this."""
        written, of = self._memory.record(job.id), f"written:{question}:{sample}"
        before, tokens = written.get(f"{of}:{channel}", ""), int(written.get(of, 0)) + len(text.split())
        written |= {f"{of}:{channel}": before + text, of: str(tokens)}
        asked = self.asked(job)
        are_several = bool(asked.questions) or asked.generation.n > 1
        event = TextGenerated(
            num_tokens_of_all=_num_written(written) if are_several else None,
            channel=channel,
            text=text,
            offset=len(before),
            num_tokens=tokens,
            attempt=self._attempt(job),
            at=time.time(),
            question=question,
            sample=sample,
        )
        self._say(job, event)

    def lose(self, job: Job | AsyncJob) -> None:
        """The worker died: the job is queued for another attempt, which begins its text anew."""
        record = self._memory.record(job.id)
        for name in [name for name in record if name.startswith("written:")]:
            del record[name]
        attempt = self._attempt(job)
        self._say(job, StageStarted(stage=Stage.QUEUED, attempt=attempt, at=time.time(), reason=QueuedAgain.LOST))
        self._move(job, JobState.QUEUED)

    def answer(self, job: Job | AsyncJob, text: Said | None = None) -> None:
        """The job has succeeded: with what was written so far, or else with this answer.

        Raises `ValueError` where a list has more or fewer than the job asks for, and for an answer that is no JSON
        where a JSON Schema says what fits.
        """
        asked = self.asked(job)
        each = [(i, n, of) for i, of in enumerate(asked.by_question()) for n in range(of.generation.n)]
        said = [text] * len(each) if text is None or isinstance(text, str) else list(text)
        if len(said) != len(each):
            raise ValueError(
                f"{len(said)} answers for a job that asks for {len(each)}. Give one for each, or one text."
            )
        if self._memory.record(job.id)["state"] == JobState.QUEUED:
            self.start(job)
        ends = [self._end_of(job, *place, what) for place, what in zip(each, said, strict=True)]
        are_several = bool(asked.questions) or len(ends) > 1
        for end in ends if are_several else ():
            code, attempt = end.code if isinstance(end, Unanswered) else None, self._attempt(job)
            facts = {"question": end.question, "sample": end.sample, "code": code, "attempt": attempt}
            facts["num_tokens_of_all"] = _num_written(self._memory.record(job.id))
            self._say(job, AnswerEnded.model_validate({**facts, "at": time.time()}))
        answers = [end for end in ends if isinstance(end, Answer)]
        if not answers:
            self.fail(job, next(end.code for end in ends if isinstance(end, Unanswered)))
            return
        first, num_tokens = answers[0], sum(answer.usage.completion_tokens for answer in answers)
        shared = first.model_dump(exclude={"kind", "question", "sample", "usage", "first_token_seconds", "generation"})
        result = JobResult(
            job_id=job.id,
            **shared,
            usage=TokenUsage(prompt_tokens=0, visual_tokens=0, completion_tokens=num_tokens),
            timings=StageTimings(),
            media=(),
            model=ModelIdentity(name="keye.testing", model_type="none", precision="none"),
            worker=WorkerIdentity(host="keye.testing", pid=0, device="none"),
            attempts=self._attempt(job),
            metadata=asked.metadata,
            answers=tuple(ends) if are_several else (),
        )
        self._memory.end(job.id, result.state, result.model_dump_json())

    def _end_of(
        self, job: Job | AsyncJob, question: int, sample: int, asked: AnalysisJob, text: str | ErrorCode | None
    ) -> Answer | Unanswered:
        if isinstance(text, ErrorCode):
            return Unanswered(question=question, sample=sample, code=text, message="as the test said")
        record, of = self._memory.record(job.id), f"written:{question}:{sample}"
        if text is not None and not record.get(f"{of}:answer"):
            self.write(job, text, question=question, sample=sample)
        answer, reasoning, analysis = (record.get(f"{of}:{name}") for name in ("answer", "reasoning", "analysis"))
        raw_text = "".join(filter(None, (analysis, reasoning, answer)))
        tokens = [TokenLogprob(token_id=0, token=word, logprob=0) for word in re.findall(r"\s*\S+|\s+$", raw_text)]
        return Answer(
            question=question,
            sample=sample,
            answer=answer or "",
            reasoning=reasoning,
            analysis=analysis,
            raw_text=raw_text,
            finish_reason="stop",
            usage=TokenUsage(prompt_tokens=0, visual_tokens=0, completion_tokens=int(record.get(of, 0))),
            first_token_seconds=None,
            generation=_generation(asked, sample),
            parsed=_parsed(asked, answer or ""),
            logprobs=tuple(tokens) if asked.generation.logprobs else None,
        )

    def fail(self, job: Job | AsyncJob, code: ErrorCode, message: str = "as the test said", **facts: Any) -> None:
        """The job has ended without an answer; `facts` are fields of its `JobFailure`."""
        facts = {"stage": Stage.GENERATE, "retryable": code.facts.retryable} | facts
        told = {"job_id": job.id, "code": code, "message": message, "metadata": self.asked(job).metadata}
        failure = JobFailure.model_validate({**told, "attempts": self._attempt(job), **facts})
        self._memory.end(job.id, failure.state, failure.model_dump_json())

    def forget(self, job: Job | AsyncJob) -> None:
        """Its record has expired."""
        self._memory.forget(job.id)

    def _reply(self, sealed: SealedJob) -> None:
        job = self.job(sealed.job_id)
        match self._replies(sealed.job) if self._replies else None:
            case ErrorCode() as code:
                self.fail(job, code)
            case str() | Sequence() as said:
                self.answer(job, said)

    def _attempt(self, job: Job | AsyncJob) -> int:
        return int(self._memory.record(job.id)["attempts"])

    def _move(self, job: Job | AsyncJob, state: JobState, **fields: str) -> None:
        self._memory.move(job.id, state, fields)

    def _say(self, job: Job | AsyncJob, event: Event) -> None:
        self._memory.add(keys.events(job.id), {"event": event.model_dump_json()})


def _num_written(record: Mapping[str, str]) -> int:
    """Tokens of all answers."""
    return sum(int(value) for name, value in record.items() if re.fullmatch(r"written:\d+:\d+", name))


def _generation(asked: AnalysisJob, sample: int) -> Generation:
    """Greedy, where the job leaves it open."""
    open_ones = {"temperature": 0, "top_p": 1, "top_k": 0, "repetition_penalty": 1, "seed": 0}
    said = asked.generation.model_dump(exclude_none=True)
    generation = Generation.model_validate({**open_ones, **said, "thinking": asked.thinking})
    return generation.model_copy(update={"seed": generation.seed + sample})


def _parsed(asked: AnalysisJob, answer: str) -> JsonValue:
    if not isinstance(asked.response_schema, dict):
        return None if asked.response_schema is None else answer
    try:
        parsed: JsonValue = json.loads(answer)
    except (ValueError, RecursionError):
        raise ValueError(f"The job has a JSON Schema for its answer, and {answer!r} is no JSON.") from None
    return parsed
