"""A job that is to be answered again as it was, and what two answers to one have otherwise. Reads nothing itself."""

from collections.abc import Iterator
from itertools import zip_longest
from typing import Any, NamedTuple

from pydantic import BaseModel

from keye.config.job import MAX_SEEDS, AnalysisJob
from keye.config.outcome import Answer, JobResult, MediaSeen

# Of what differs as many lines are told, each with so much of either side: a person compares them.
MAX_DIFFERENCES = 50
_MAX_CHARS = 120
# How the one who keeps the file tells it; where its bytes are known to be the same that is no difference.
_TOLD_OF_THE_FILE = {"etag", "version_id", "last_modified", "modified_at", "inode"}


class Difference(NamedTuple):
    """`what` names it as in a result, such as `media[0].sha256`; text is told from where it differs on, cut short."""

    what: str
    before: str
    after: str


def seeded(job: AnalysisJob, result: JobResult) -> AnalysisJob:
    """The job with the seeds that its answers were drawn by, as far as they are told: workers before 0.3 told none."""
    answers = [each for each in result.answers if isinstance(each, Answer)]
    # Samples have those that follow the first's, which may be among the unanswered.
    seeds = {each.question: (each.generation.seed - each.sample) % MAX_SEEDS for each in answers}
    if not result.answers and result.generation is not None:
        seeds[0] = result.generation.seed
    drawn = []
    for index, asked in enumerate(job.by_question()):
        seed = seeds.get(index, asked.generation.seed)
        drawn.append(asked.generation.model_copy(update={"seed": seed}))
    if not job.questions:
        return job.model_copy(update={"generation": drawn[0]})
    pairs = zip(job.questions, drawn, strict=True)
    questions = tuple(question.model_copy(update={"generation": generation}) for question, generation in pairs)
    return job.model_copy(update={"questions": questions})


def differences(before: JobResult, after: JobResult) -> list[Difference]:
    """None where the same model saw the same pixels and wrote the same text; at most `MAX_DIFFERENCES`."""
    found = [*_media(before, after)]
    found += _fields("model", before.model, after.model)
    found += _of("worker.device", before.worker.device, after.worker.device)
    found += _fields("generation", before.generation, after.generation)
    found += _of("finish_reason", before.finish_reason, after.finish_reason)
    found += _of("raw_text", before.raw_text, after.raw_text)
    for index, pair in enumerate(zip_longest(before.answers, after.answers)):
        for name in ("code", "finish_reason", "raw_text"):
            found += _of(f"answers[{index}].{name}", *(getattr(each, name, None) for each in pair))
    return found[:MAX_DIFFERENCES]


def _media(before: JobResult, after: JobResult) -> Iterator[Difference]:
    for index, pair in enumerate(zip_longest(before.media, after.media)):
        yield from _fields(f"media[{index}]", *pair)


def _fields(what: str, before: BaseModel | None, after: BaseModel | None) -> Iterator[Difference]:
    if before is None or after is None:
        yield from _of(what, before, after)
        return
    digests = {each.sha256 if isinstance(each, MediaSeen) else None for each in (before, after)}
    are_same_bytes = len(digests) == 1 and None not in digests
    for name in type(before).model_fields:
        if not (are_same_bytes and name in _TOLD_OF_THE_FILE):
            yield from _of(f"{what}.{name}", getattr(before, name), getattr(after, name))


def _of(what: str, before: Any, after: Any) -> Iterator[Difference]:
    if before == after:
        return
    told, told_after = (each if isinstance(each, str) else repr(each) for each in (before, after))
    start = next((i for i, (a, b) in enumerate(zip_longest(told, told_after)) if a != b), 0)
    # A little of what is the same before it, to be found by.
    start = max(0, start - _MAX_CHARS // 4)
    yield Difference(what, *(_cut(each, start) for each in (told, told_after)))


def _cut(text: str, start: int) -> str:
    cut = text[start : start + _MAX_CHARS]
    return ("..." if start else "") + cut + ("..." if start + len(cut) < len(text) else "")
