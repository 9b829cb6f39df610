"""What two answers to one job have otherwise: media, model, generation and text. Reads nothing itself."""

from collections.abc import Iterator
from itertools import zip_longest
from typing import Any, NamedTuple

from pydantic import BaseModel

from keye.config.outcome import JobResult, MediaSeen

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


def differences(before: JobResult, after: JobResult) -> list[Difference]:
    """None where the same model saw the same pixels and wrote the same text; at most `MAX_DIFFERENCES`."""
    found = [*_media(before, after)]
    found += _fields("model", before.model, after.model)
    found += _of("worker.device", before.worker.device, after.worker.device)
    found += _fields("generation", before.generation, after.generation)
    found += _of("finish_reason", before.finish_reason, after.finish_reason)
    found += _of("raw_text", before.raw_text, after.raw_text)
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
