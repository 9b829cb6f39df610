"""A batch as somebody asks for it: what its source is, where its answers go, and where an earlier run left it."""

import json
import os
import time
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keye.config.contract import escaped
from keye.config.faults import InvalidBatch, InvalidJob, OutputUnwritable
from keye.config.formats import media_type_of
from keye.config.job import Priority
from keye.producer.batch.batch import MAX_IN_FLIGHT, Batch
from keye.producer.batch.journal import SUFFIX, Journal
from keye.producer.batch.lines import Ended, State, named
from keye.producer.batch.listing import Folder, Prefix
from keye.producer.batch.output import Output
from keye.producer.batch.report.report import check_path, write_report
from keye.producer.batch.source import TABLE_SUFFIXES, JsonLines, Source, Table, open_file
from keye.producer.batch.written import ONCE_IT_CAN
from keye.producer.client import build_job

if TYPE_CHECKING:
    from keye.producer.client import Client

_FILES = (*TABLE_SUFFIXES, ".jsonl", ".ndjson", ".json")


def open_batch(
    client: "Client",
    given: str | os.PathLike[str],
    output: str | os.PathLike[str],
    prompt: str | None,
    *,
    endpoint_url: str | None,
    errors: str | os.PathLike[str] | None = None,
    report: str | os.PathLike[str] | None = None,
    retry_failed: bool = False,
    max_in_flight: int = MAX_IN_FLIGHT,
    **options: Any,
) -> Batch:
    """One that is to be started; see `Client.submit_batch`. Raises `InvalidBatch`, and `InvalidJob`."""
    if max_in_flight < 1:
        raise InvalidBatch(f"max_in_flight is {max_in_flight}: nothing would ever be sent. Give 1 or more.")
    asks = prompt is not None or bool(options.get("questions"))
    job = build_job({**options, "prompt": prompt if asks else "?"})
    # As JSON, whatever they were made of.
    own = {"questions", "response_schema"} & options.keys()
    options |= job.model_dump(mode="json", include=own, exclude_defaults=True)
    answers, page = Path(output), None if report is None else Path(report)
    if not answers.name:
        raise InvalidBatch(f"{escaped(os.fspath(output))!r} names no file for the answers.")
    failures = answers.with_suffix(f".errors{answers.suffix}") if errors is None else Path(errors)
    journal_path = answers.with_name(answers.name + SUFFIX)
    try:
        given_ones = (Path(given), answers, failures, journal_path, page)
        files = [os.path.realpath(each) for each in given_ones if each is not None]
    except ValueError as fault:
        raise InvalidBatch(f"{escaped(os.fspath(given))} or a file for what comes of it is none: {fault}.") from None
    if twice := next((each for each in files if files.count(each) > 1), None):
        raise InvalidBatch(
            f"{escaped(twice)} is given twice. The input, the answers, the errors and a report are a file each."
        )
    for name in files[1:]:
        # A link that leads round in a circle is none.
        if os.path.lexists(name) and not os.path.isfile(name):
            raise InvalidBatch(f"{escaped(name)} is no file, which could be written and gone on with.")
    for path in (answers, failures):
        if not os.access(path.parent, os.W_OK | os.X_OK):
            why = f"there is no folder {escaped(str(path.parent))} that may be written to"
            raise OutputUnwritable(f"{escaped(str(path))} cannot be written: {why}. {ONCE_IT_CAN}")
    if page is not None:
        check_path(page)
    with ExitStack() as opened:
        source = open_source(os.fspath(given), asks, endpoint_url)
        opened.callback(source.close)
        is_new = not (os.path.exists(journal_path) and journal_path.stat().st_size)
        for path in (answers, failures):
            if is_new and os.path.exists(path) and path.stat().st_size:
                raise InvalidBatch(
                    f"{escaped(str(path))} is there already, and no batch began it that could be gone on with. Give "
                    "another output, or remove it."
                )
        defaults = {"priority": Priority.LOW, **({} if prompt is None else {"prompt": prompt}), **options}
        asked = defaults if isinstance(source, JsonLines | Table) else {**defaults, "input": os.fspath(given)}
        journal = Journal(str(journal_path), json.dumps(asked, sort_keys=True, default=str))
        opened.callback(journal.close)
        source.go_to(journal.position)
        outputs = [Output(path, written) for path, written in zip((answers, failures), journal.written, strict=True)]
        ended: list[Ended] = []
        for each in outputs:
            each.recover(lambda line: _take(line, journal, ended))
        journal.end(ended, *(each.written for each in outputs))
        if retry_failed:
            journal.retry_failed()
            outputs[1].empty()
        write = None
        if page is not None:
            write = partial(write_report, page, os.fspath(given), defaults, endpoint_url)
        batch = Batch(client, source, journal, (outputs[0], outputs[1]), defaults, max_in_flight, write)
        opened.pop_all()
    return batch


def open_source(given: str, asks: bool, endpoint_url: str | None) -> Source:
    """`asks` is whether there is a question for all of it. Raises `InvalidBatch`."""
    source: Source
    if given[:5].lower() == "s3://":
        if given.lower().endswith(_FILES):
            raise InvalidBatch(f"{escaped(given)} is a file of a bucket. Download it, and give it from here.")
        source = Prefix(given, endpoint_url)
    elif os.path.isdir(given):
        source = Folder(given)
    else:
        if media_type_of(given) is not None:
            raise InvalidBatch(
                f"{escaped(given)} is a medium itself. Give the folder or the prefix that it is in; of one alone "
                "`keye submit` asks."
            )
        source = open_file(given)
    has_own = isinstance(source, JsonLines) or not {"prompt", "questions"}.isdisjoint(getattr(source, "columns", ()))
    if not asks and not has_own:
        source.close()
        what = "holds no questions"
        if isinstance(source, Table):
            what = f"has no column prompt, but {', '.join(source.columns)}"
        raise InvalidBatch(f"{escaped(given)} {escaped(what)}. Give one question, for all.")
    return source


def _take(line: Mapping[str, Any], journal: Journal, ended: list[Ended]) -> bool | None:
    """Whether a line was written of one whose end is not known yet, which is noted then; None where nothing is."""
    response, custom_id = line.get("response"), line.get("custom_id")
    job_id = response.get("request_id") if isinstance(response, Mapping) else line.get("job_id")
    try:
        row = journal.find(None if custom_id is None else named(custom_id), job_id)
    except InvalidJob:
        row = None
    if row is None or row.state in (State.ANSWERED, State.FAILED):
        return None
    if row.state is State.UNSENT and job_id != journal.job_id(row):
        # Its failure, which was not removed yet when it was to be sent again.
        return False
    timings, error = line.get("timings"), line.get("error")
    seconds = timings.get("queued", 0) + timings.get("total", 0) if isinstance(timings, Mapping) else None
    code = error.get("code") if isinstance(error, Mapping) else line.get("code")
    ended.append(Ended(row.number, time.time(), seconds, code))
    return True
