"""`keye list` and `keye top`, and of `keye status` and `keye cancel` what is of one job or of all that are queued."""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from typing import Annotated

import typer

from keye.config.codes import ErrorCode, JobState
from keye.config.contract import escaped
from keye.config.faults import KeyeError
from keye.producer.client import Client
from keye.producer.dead_cli import moment, parse_period
from keye.producer.job import Cancellation
from keye.producer.progress import JobStatus, period
from keye.producer.records import JobSummary
from keye.producer.shell import AsJson, ExitCode, RedisUrl, confirmed, connected, tell, width_of

States = Annotated[
    list[JobState] | None,
    typer.Option("--state", case_sensitive=False, metavar="STATE", help="only in this one; may be repeated"),
]
Codes = Annotated[
    list[ErrorCode] | None, typer.Option("--code", metavar="CODE", help="only ended with this one; may be repeated")
]
Since = Annotated[
    float | None,
    typer.Option(parser=parse_period, metavar="PERIOD", help="submitted within the last 90s, 30m, 2h or 7d"),
]
Older = Annotated[float | None, typer.Option(parser=parse_period, metavar="PERIOD", help="submitted before that")]


def list_jobs(
    state: States = None,
    code: Codes = None,
    since: Since = None,
    older: Older = None,
    limit: Annotated[int, typer.Option(min=1, help="so many, the newest")] = 50,
    as_json: AsJson = False,
    redis_url: RedisUrl = None,
) -> None:
    """Print jobs, the newest first: id, state, age, where it is or why it ended, worker; with --json, one a line."""
    with connected(redis_url) as client:
        jobs, num_found = client.list_jobs(state or (), code or (), since, older, limit)
    for job in jobs:
        tell(job.model_dump_json() if as_json else shortened(escaped(in_a_line(job))))
    if num_more := num_found - len(jobs):
        tell(f"{num_more:,} more (--limit)", err=True)


def top(
    interval: Annotated[
        float | None,
        typer.Option(min=0.1, help="seconds between frames; default: 2 in a terminal, elsewhere one frame is all"),
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="print one frame and end")] = False,
    as_json: AsJson = False,
    redis_url: RedisUrl = None,
) -> None:
    """Watch queues, workers and running jobs; q or Ctrl-C ends it. With --json, an object a frame, each in a line."""
    # With what draws, which no other command needs.
    from keye.producer.top import show

    with suppress(KeyboardInterrupt), connected(redis_url) as client:
        show(client, interval, once, as_json)


def show_job(client: Client, job_id: str, as_json: bool) -> None:
    status = client.job_status(job_id)
    if as_json:
        tell(status.model_dump_json())
    else:
        tell("\n".join(map(escaped, lines_of(status))), hang=8)


def cancel_all_queued(client: Client, is_sure: bool, as_json: bool) -> None:
    """Cancelling a job is one move: cut off in between, those told of are cancelled, and the rest are queued."""
    queued, num_queued = client.list_jobs([JobState.QUEUED], limit=None)
    if queued and not confirmed(f"Cancel {num_queued:,} queued job{'s' * (num_queued > 1)}?", is_sure):
        tell("None was cancelled.", err=True)
        return
    counts: Counter[str] = Counter()
    refusals: list[KeyeError] = []
    try:
        # The oldest first: it is the next to begin.
        for job_id, done in client.cancel_queued(job.job_id for job in reversed(queued)):
            if isinstance(done, KeyeError):
                refusals.append(done)
                tell(escaped(f"{job_id}: {done}"), err=True)
                told = {"job_id": job_id, "cancellation": None, "error": str(done)}
            else:
                counts[done] += 1
                told = {"job_id": job_id, "cancellation": done}
            if as_json:
                tell(json.dumps(told))
            elif not isinstance(done, KeyeError):
                tell(escaped(f"{job_id} {done}"))
    finally:
        left = counts[Cancellation.LEFT_RUNNING]
        began = f", {left:,} began meanwhile and run on (keye cancel JOB)" if left else ""
        refused = f", {len(refusals):,} refused" if refusals else ""
        tell(f"{counts[Cancellation.CANCELLED]:,} cancelled{began}{refused}", err=True)
    if refusals:
        raise typer.Exit(ExitCode.of(refusals[0]))


def in_a_line(job: JobSummary) -> str:
    """The id first and whole, and last what narrow terminals may have no room for."""
    age = "?" if job.age_seconds is None else period(job.age_seconds)
    # Other ends without an answer have a code each, which says the same.
    where = job.code if job.state is JobState.FAILED else job.stage if job.state is JobState.RUNNING else None
    words = [None if job.is_readable else "unreadable", job.state, where, job.worker]
    return " ".join([job.job_id, f"{age:>4}", *(word for word in words if word)])


def shortened(line: str) -> str:
    """To the width of the terminal, if it goes to one."""
    if sys.stdout.isatty():
        from rich.text import Text

        text = Text(line)
        text.truncate(width_of(sys.stdout), overflow="ellipsis")
        return text.plain
    return line


def lines_of(job: JobStatus) -> Iterator[str]:
    """One job for a terminal."""
    since = "" if job.since is None else f" for {period(job.seconds or 0)}, since {moment(job.since)}"
    yield f"{'job':<8}{job.job_id}"
    yield f"{'state':<8}{job.state}{since}"
    if job.stage is not None:
        again = "" if job.reason is None else f", {job.reason.replace('_', ' ')}"
        yield f"{'stage':<8}{job.stage}, " + (f"attempt {job.attempt}{again}" if job.attempt else "no attempt yet")
    if job.place is not None and job.state is JobState.QUEUED:
        yield f"{'place':<8}{f'{job.place:,} before it' if job.place else 'the next'}"
    if job.due_at is not None:
        yield f"{'due':<8}not before {moment(job.due_at)}"
    if job.frames_total is not None:
        yield f"{'frames':<8}{job.frames_done:,} of {job.frames_total:,}"
    if job.num_tokens:
        yield f"{'tokens':<8}{job.num_tokens:,}"
    if job.code is not None:
        yield f"{'why':<8}{job.code} in {job.ended_in}, attempt {job.attempt}: {job.message}"
    if not job.state.is_final:
        yield f"{'left':<8}" + ("not known" if job.seconds_left is None else f"about {period(job.seconds_left)}")
    if job.worker is not None:
        yield f"{'worker':<8}{job.worker}" + (", the last" if job.state is JobState.QUEUED else "")
    if not (job.has_worker or job.state.is_final):
        yield f"{'worker':<8}none is alive with its model loaded"
