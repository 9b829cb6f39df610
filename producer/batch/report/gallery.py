"""The answers that a page about a batch shows: some from all over it, with their questions and thumbnails."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from keye.config.faults import InvalidBatch, InvalidJob
from keye.producer.batch.journal import Journal
from keye.producer.batch.lines import Row, read_fields
from keye.producer.batch.report.markup import Excerpt, shorten
from keye.producer.batch.report.page import Answer
from keye.producer.batch.report.thumbnails import Thumbnails
from keye.producer.medium import NoMedium, in_our_words

MAX_ANSWERS, MAX_THUMBNAILS = 200, 200
_MAX_THUMBNAILS_EACH = 3
# As HTML in UTF-8.
_ANSWER_BYTES, _QUESTION_BYTES = 2400, 900
# Whose media, which may be inside the questions, are held at a time.
_ANSWERS_AT_A_TIME = 8

Read = Callable[[Row], Mapping[str, Any] | InvalidJob]


class Spread:
    """Of `count` things that come one after another, takes at most `most`, from all over."""

    def __init__(self, count: int, most: int) -> None:
        self._step = max(count / most, 1)
        self._num_seen, self._num_taken, self._most = 0, 0, most

    def takes_next(self) -> bool:
        takes = self._num_seen >= self._num_taken * self._step and self._num_taken < self._most
        self._num_seen += 1
        self._num_taken += takes
        return takes


def show_answers(
    output: Path, num_answered: int, prompt: str | None, journal: Journal, read: Read, thumbnails: Thumbnails
) -> Iterator[Answer]:
    """`prompt` is said of all, and not again of each."""
    spread = Spread(num_answered, MAX_ANSWERS)
    num_each = max(1, min(_MAX_THUMBNAILS_EACH, MAX_THUMBNAILS // max(1, min(num_answered, MAX_ANSWERS))))
    lines = (text for text in all_lines(output) if spread.takes_next())
    found = (answer for text in lines if (answer := _answer_of(text, prompt, journal, read)))
    while some := list(islice(found, _ANSWERS_AT_A_TIME)):
        made = iter(thumbnails.of(uri for _, media in some for uri in media[:num_each]))
        for each, media in some:
            shown = [made_of._replace(name=shorten(made_of.name)) for made_of in islice(made, len(media[:num_each]))]
            yield each._replace(thumbnails=shown, num_media=len(media))


def all_lines(path: Path) -> Iterator[bytes]:
    """None of a file that is not there."""
    if path.exists():
        with path.open("rb") as file:
            yield from file


def _answer_of(text: bytes, prompt: str | None, journal: Journal, read: Read) -> tuple[Answer, list[str]] | None:
    """And the media that it is about; None where a line is not as it was written."""
    line: Any = read_fields(text)
    try:
        if "response" in line:
            said = line["response"]["body"]
            choices, model = said["choices"], said["model"]
            answers = [choice["message"]["content"] for choice in choices]
            reasoning = choices[0]["message"].get("reasoning_content")
            finish_reasons = {choice["finish_reason"] for choice in choices}
        else:
            said, model = line, line["model"]["name"]
            given = line.get("answers") or [line]
            answers = [each["answer"] if "answer" in each else f"({each['code']})" for each in given]
            reasoning, finish_reasons = line["reasoning"], {each.get("finish_reason") for each in given}
        usage = said["usage"]
        found = journal.answered(str(line["custom_id"]))
        if found is None:
            return None
        row, seconds = found
        facts = [] if seconds is None else [f"{seconds:,.1f} s"]
        facts.append(f"{usage['prompt_tokens']:,} tokens read, {usage['completion_tokens']:,} written")
        if "length" in finish_reasons:
            facts.append("cut off at its most tokens")
        question, media = _asked(row, read)
        shown = Answer(
            custom_id=shorten(line["custom_id"]),
            number=row.number,
            question=None if question in (None, prompt) else Excerpt.of(str(question), _QUESTION_BYTES),
            answer=Excerpt.of(_numbered(answers), _ANSWER_BYTES),
            reasoning=Excerpt.of(reasoning, _ANSWER_BYTES) if reasoning else None,
            model=shorten(model),
            facts=facts,
            thumbnails=(),
            num_media=0,
        )
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        # Somebody has changed it since.
        return None
    return shown, media


def _asked(row: Row, read: Read) -> tuple[str | None, list[str]]:
    """The last that a job's line says, and all media in it; nothing where its line is gone."""
    try:
        fields = read(row)
    except InvalidBatch:
        return None, []
    if isinstance(fields, InvalidJob):
        return None, []
    said, parts = question_of(fields), _listed(fields.get("media"))
    for message in _listed(fields.get("messages")):
        for part in _listed(message.get("content") if isinstance(message, Mapping) else None):
            text = part.get("text") if isinstance(part, Mapping) else part
            if isinstance(text, str):
                said = text
            else:
                parts.append(part)
    return said, [uri for part in parts if (uri := _uri_of(part))]


def question_of(fields: Mapping[str, Any]) -> str | None:
    """Of fields of a job as a client takes them; of several questions all."""
    questions = []
    for each in _listed(fields.get("questions")):
        questions.append(str(each.get("prompt") if isinstance(each, Mapping) else getattr(each, "prompt", each)))
    return _numbered(questions) if questions else fields.get("prompt")


def _numbered(texts: Sequence[str]) -> str:
    """One as it is, of several each behind its number."""
    return texts[0] if len(texts) == 1 else "\n".join(f"{number}. {text}" for number, text in enumerate(texts, 1))


def _listed(given: Any) -> list[Any]:
    return [] if given is None else list(given) if isinstance(given, list | tuple) else [given]


def _uri_of(part: Any) -> str | None:
    try:
        uri = in_our_words(part).get("uri") if isinstance(part, Mapping) else part
    except NoMedium:
        return None
    return uri if isinstance(uri, str) else None
