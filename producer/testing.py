"""A client for tests of programs that ask: no Redis and no worker, and jobs that end as the test says."""

import time
from collections.abc import Callable
from typing import Any

from keye.config import keys
from keye.config.codes import ErrorCode, JobState, QueuedAgain, Stage
from keye.config.event import Event, FramesDecoded, StageStarted, TextGenerated
from keye.config.job import AnalysisJob
from keye.config.outcome import JobFailure, JobResult, ModelIdentity, StageTimings, TokenUsage, WorkerIdentity
from keye.config.settings import ProducerSettings
from keye.config.wire import SealedJob
from keye.producer.async_client import AsyncJob
from keye.producer.client import Client
from keye.producer.job import Job
from keye.producer.memory import MemoryTransport

Reply = Callable[[AnalysisJob], "str | ErrorCode | None"]


class MemoryClient(Client):
    """A `Client` that keeps jobs in this process; `AsyncClient(MemoryClient())` is the same for asyncio.

    >>> client = MemoryClient(lambda job: "a cat" if job.media else ErrorCode.INVALID_JOB)
    >>> client.submit(prompt="What is it?", media=["s3://photos/1.jpg"]).result().answer
    'a cat'

    Each job ends at once as `reply` says, with an answer or a code; where it says None, or there is none, the job waits
    for the test: `start`, `decode`, `write`, then `answer` or `fail`. Settings are the defaults, whatever the
    environment says. There are no dead letters and no quarantine.
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

    def write(self, job: Job | AsyncJob, text: str, channel: str = "answer") -> None:
        """The next text of the answer, the reasoning or the analysis, a token a word."""
        written = self._memory.record(job.id)
        before, tokens = written.get(f"text:{channel}", ""), int(written.get("tokens", 0)) + len(text.split())
        written |= {f"text:{channel}": before + text, "tokens": str(tokens)}
        event = TextGenerated(
            channel=channel,
            text=text,
            offset=len(before),
            num_tokens=tokens,
            attempt=self._attempt(job),
            at=time.time(),
        )
        self._say(job, event)

    def lose(self, job: Job | AsyncJob) -> None:
        """The worker died: the job is queued for another attempt, which begins its text anew."""
        record = self._memory.record(job.id)
        for name in ("text:answer", "text:reasoning", "text:analysis", "tokens"):
            record.pop(name, None)
        attempt = self._attempt(job)
        self._say(job, StageStarted(stage=Stage.QUEUED, attempt=attempt, at=time.time(), reason=QueuedAgain.LOST))
        self._move(job, JobState.QUEUED)

    def answer(self, job: Job | AsyncJob, text: str | None = None) -> None:
        """The job has succeeded: with what was written so far, or else with this answer."""
        record = self._memory.record(job.id)
        if record["state"] == JobState.QUEUED:
            self.start(job)
        if text is not None and not record.get("text:answer"):
            self.write(job, text)
        answer, reasoning, analysis = (record.get(f"text:{each}") for each in ("answer", "reasoning", "analysis"))
        result = JobResult(
            job_id=job.id,
            answer=answer or "",
            reasoning=reasoning,
            analysis=analysis,
            raw_text="".join(filter(None, (analysis, reasoning, answer))),
            finish_reason="stop",
            usage=TokenUsage(prompt_tokens=0, visual_tokens=0, completion_tokens=int(record.get("tokens", 0))),
            timings=StageTimings(),
            media=(),
            model=ModelIdentity(name="keye.testing", model_type="none", precision="none"),
            worker=WorkerIdentity(host="keye.testing", pid=0, device="none"),
            attempts=self._attempt(job),
            metadata=self.asked(job).metadata,
        )
        self._memory.end(job.id, result.state, result.model_dump_json())

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
            case str() as text:
                self.answer(job, text)

    def _attempt(self, job: Job | AsyncJob) -> int:
        return int(self._memory.record(job.id)["attempts"])

    def _move(self, job: Job | AsyncJob, state: JobState, **fields: str) -> None:
        self._memory.move(job.id, state, fields)

    def _say(self, job: Job | AsyncJob, event: Event) -> None:
        self._memory.add(keys.events(job.id), {"event": event.model_dump_json()})
