"""What a page about a batch says, gathered within bounds, of a million lines as of a hundred. `page` writes it.

It has at most 5 MB: so many answers and failures, each cut, and thumbnails of a bounded size.
"""

import math
import os
import re
import time
import uuid
from array import array
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keye.config.codes import ErrorCode
from keye.config.contract import escaped
from keye.config.faults import InvalidBatch, InvalidJob
from keye.config.medium_name import name_medium
from keye.producer.batch.journal import Journal
from keye.producer.batch.lines import State, read_fields
from keye.producer.batch.report.chart import Bar, round_up
from keye.producer.batch.report.gallery import Read, Spread, all_lines, question_of, show_answers
from keye.producer.batch.report.markup import Excerpt, shorten
from keye.producer.batch.report.page import Asked, Failures, Page, Seconds, Totals, write_page
from keye.producer.batch.report.thumbnails import Thumbnails

if TYPE_CHECKING:
    from keye.producer.batch.progress import BatchProgress

MAX_FAILURES = 100
_PROMPT_BYTES, _MESSAGE_BYTES = 3000, 1000
_MAX_BARS = 40
_WIDTHS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, 43200, 86400)

WriteReport = Callable[["BatchProgress", Journal, tuple[Path, Path], Read], None]


def check_path(path: Path) -> None:
    """Before anything is sent. Raises `InvalidBatch` where no page could be written there."""
    with _telling(path):
        _write(path, None)


def write_report(
    path: Path,
    source: str,
    options: Mapping[str, Any],
    endpoint_url: str | None,
    progress: "BatchProgress",
    journal: Journal,
    outputs: tuple[Path, Path],
    read: Read,
) -> None:
    """Of what has ended by now, which `progress` counts.

    `source` was read, and `options` of jobs are for what does not say its own; `endpoint_url` is that of buckets;
    `outputs` have the answers and the errors; `read` tells what a line asks.
    Raises `InvalidBatch` where it cannot be written.
    """
    with _telling(path), closing(Thumbnails(endpoint_url)) as thumbnails:
        ended, prompt = journal.first_and_last_end(), question_of(options)
        answers = list(show_answers(outputs[0], progress.answered, prompt, journal, read, thumbnails))
        answers.sort(key=lambda answer: answer.number)
        models = Counter(answer.model for answer in answers)
        facts = [f"answered by {name}" for name, _ in models.most_common(3)]
        width, ends = (0.0, []) if ended is None else _ends(journal, min(journal.begun_at, ended[0]), ended[1])
        page = Page(
            asked=Asked(
                shorten(
                    name_medium(source) if source[:5].lower() == "s3://" else Path(source).absolute().name or source
                ),
                None if prompt is None else Excerpt.of(prompt, _PROMPT_BYTES),
                [*facts, *_told(options)],
            ),
            totals=Totals(
                progress.answered,
                progress.failed,
                progress.lines - progress.ended,
                progress.is_read,
                journal.begun_at,
                None if ended is None else ended[1],
            ),
            width=width,
            ends=ends,
            seconds=_seconds(array("d", journal.seconds())),
            failures=_failures(outputs[1], journal.failures()),
            answers=answers,
            lacks=thumbnails.lacks,
            files=(shorten(outputs[0].name), shorten(outputs[1].name)),
            written_at=time.time(),
        )
        _write(path, write_page(page))


def _told(options: Mapping[str, Any]) -> Iterator[str]:
    """Those that shape an answer, of words and numbers."""
    if thinking := options.get("thinking"):
        yield f"thinking: {thinking}"
    generation = options.get("generation")
    if isinstance(generation, Mapping):
        yield from (f"{name}: {value}" for name, value in generation.items() if isinstance(value, int | float))


def _ends(journal: Journal, start: float, end: float) -> tuple[float, list[Bar]]:
    """How many seconds each bar has, and all of them."""
    span = end - start
    days = round_up(max(span / _MAX_BARS / 86400, 1)) * 86400
    width = next((width for width in _WIDTHS if span / width <= _MAX_BARS), days)
    bars = [Bar(index * width, (index + 1) * width, 0) for index in range(int(span / width) + 1)]
    for index, state, count in journal.ends(start, width):
        bars[index] = bars[index]._replace(**{"answered" if state is State.ANSWERED else "failed": count})
    return width, bars


def _seconds(times: Sequence[float]) -> Seconds | None:
    """Of all, the shortest first."""
    if not times:
        return None

    def within(share: float) -> float:
        return times[max(0, math.ceil(share * len(times)) - 1)]

    # A few that took far longer would leave no room for the others: they share the last bar.
    most = times[-1] if times[-1] <= 1.5 * within(0.99) else within(0.99)
    width = round_up(most / 40) if most else 0.1
    num_bars = max(1, math.ceil(most / width - 1e-9))
    edges = [0, *(bisect_left(times, index * width) for index in range(1, num_bars)), len(times)]
    bars = [Bar(index * width, (index + 1) * width, edges[index + 1] - edges[index]) for index in range(num_bars)]
    num_beyond = len(times) - bisect_left(times, num_bars * width) if times[-1] > most else 0
    return Seconds(bars, within(0.5), within(0.95), times[-1], num_beyond)


def _failures(errors: Path, counts: Mapping[str, int]) -> list[Failures]:
    shown = dict(islice(counts.items(), MAX_FAILURES))
    spreads = {code: Spread(count, MAX_FAILURES // len(shown)) for code, count in shown.items()}
    examples: dict[str, dict[str, list[str]]] = {code: defaultdict(list) for code in shown}
    for line in map(read_fields, all_lines(errors)):
        if isinstance(line, InvalidJob):
            continue
        fault = line["error"] if isinstance(line.get("error"), Mapping) else line
        code = fault.get("code")
        if isinstance(code, str) and code in spreads and spreads[code].takes_next():
            name = line.get("custom_id") or (f"line {line['line']}" if "line" in line else "without custom_id")
            # Said of many, it is said once.
            said = re.sub(r"\Aline \d+: ", "", str(fault.get("message")))
            message = Excerpt.of(said, _MESSAGE_BYTES).text
            examples[code][message].append(shorten(str(name)))
    return [Failures(shorten(code), _meaning(code), count, examples[code]) for code, count in shown.items()]


def _meaning(code: str) -> str:
    known = ErrorCode.__members__.get(code)
    return known.facts.meaning if known else ""


def _write(path: Path, text: str | None) -> None:
    """All of it or, as with None, nothing. Who looks at it meanwhile sees the one before."""
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{uuid.uuid4().hex}")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with open(handle, "wb") as file:
            file.write((text or "").encode())
            file.flush()
            os.fsync(file.fileno())
        if text is not None:
            os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _telling(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError) as fault:
        if isinstance(fault, InvalidBatch):
            raise
        why = (isinstance(fault, OSError) and fault.strerror) or str(fault)
        raise InvalidBatch(
            f"The report {escaped(str(path))} cannot be written: {escaped(why)}. What was answered is kept: the same "
            "batch with another path for its report goes on from there."
        ) from None
