"""`keye batch`: many jobs from a file, a folder or a bucket into a file of answers, whatever ends it meanwhile."""

import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

from keye.config.contract import escaped
from keye.config.job import Priority, Thinking
from keye.producer.batch.batch import MAX_IN_FLIGHT, Batch
from keye.producer.batch.progress import BatchProgress
from keye.producer.console import OurConsole
from keye.producer.shell import (
    Also,
    AsJson,
    CommandLine,
    ExitCode,
    RedisUrl,
    SchemaFile,
    asked_of,
    connected,
    read_schema,
    tell,
)

# Between two looks at how far it is; and between two lines of that where nobody watches, but for what is news.
LOOK_SECONDS, LINE_SECONDS, NEWS_SECONDS = 0.2, 30.0, 3.0
# Of so long, to say how many lines end a second; and of no less.
PACE_SECONDS, LEAST_PACE_SECONDS = 30.0, 2.0

app = CommandLine("keye", help="Answer a file of questions, or one question about all that a folder or a bucket holds.")


@app.command()
def run(
    source: Annotated[
        str, typer.Argument(metavar="INPUT", help="JSON lines, a CSV table, a folder, or s3://bucket/prefix")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="the answers, a line of JSON each")],
    prompt: Annotated[
        str | None,
        typer.Argument(
            help="the question, for what does not say its own; a folder or a bucket needs one; - for standard input"
        ),
    ] = None,
    also: Also = None,
    response_schema: SchemaFile = None,
    errors: Annotated[
        Path | None, typer.Option(help="what has no answer, and why; default: OUTPUT's name with .errors in it")
    ] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="run again what failed before")] = False,
    in_flight: Annotated[int, typer.Option(min=1, help="most jobs that wait or run at a time")] = MAX_IN_FLIGHT,
    thinking: Annotated[
        Thinking | None,
        typer.Option(metavar="MODE", help=f"whether it reasons before it answers: {', '.join(Thinking)}"),
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="longest answer, in tokens")] = None,
    priority: Annotated[
        Priority, typer.Option(metavar="LEVEL", help=f"which queued jobs go first: {', '.join(Priority)}")
    ] = Priority.LOW,
    report: Annotated[
        Path | None, typer.Option(help="a page to look at, once it ends: answers, failures, times")
    ] = None,
    as_json: AsJson = False,
    redis_url: RedisUrl = None,
) -> None:
    """Ask what each line asks, and write down each answer as it comes. Begun again, it goes on where it was."""
    if also and prompt is None:
        raise typer.BadParameter("--also is for another question: give the first too")
    options: dict[str, Any] = {"thinking": thinking, "priority": priority}
    if max_new_tokens is not None:
        options["generation"] = {"max_new_tokens": max_new_tokens}
    if "-" in (source, str(output)):
        raise typer.BadParameter("what is to be gone on with needs files, not standard input or output")
    with connected(redis_url) as client:
        options |= {**asked_of(prompt, also), "response_schema": read_schema(response_schema)}
        options = {name: value for name, value in options.items() if value is not None}
        # Whoever mistook its URL hears it now; later on Redis may be away for a while.
        client.kept_seconds()
        batch = client.submit_batch(
            source,
            output,
            errors=errors,
            report=report,
            retry_failed=retry_failed,
            max_in_flight=in_flight,
            **options,
        )
        try:
            with telling() as tell_of:
                ended = watched(batch, tell_of)
        except (KeyboardInterrupt, SystemExit):
            if report is not None:
                tell("Its report is being written. Ctrl-C once more ends at once, without it.", err=True)
            batch.stop()
            told = escaped(in_a_line(batch.progress, ""))
            tell(f"{told}. What is in flight is answered all the same. The same command goes on from here.", err=True)
            raise
    if ended.trouble:
        tell(escaped(ended.trouble), err=True)
    if as_json:
        counts = {"total": ended.lines, "completed": ended.answered, "failed": ended.failed}
        tell(json.dumps({"request_counts": counts, "output_file": str(output), "error_file": str(batch.errors_path)}))
    else:
        answers = f" ({output})" if ended.answered else ""
        failures = f" ({batch.errors_path}; --retry-failed runs them again)" if ended.failed else ""
        counted = (
            f"{number(ended.lines, 'line')}: {ended.answered:,} answered{answers}, {ended.failed:,} failed{failures}"
        )
        tell(escaped(counted))
    if ended.passed_over:
        tell(f"{number(ended.passed_over, 'file')} passed over, by name neither image nor video", err=True)
    if 0 < ended.lines == ended.ended_before:
        tell("All had ended before: nothing was asked", err=True)
    if not ended.lines:
        tell(escaped(f"{source} holds nothing that could be asked"), err=True)
        raise typer.Exit(ExitCode.INVALID)
    if ended.failed:
        raise typer.Exit(ExitCode.JOB_FAILED)


def number(count: int, of: str) -> str:
    return f"{count:,} {of}{'' if count == 1 else 's'}"


def watched(batch: Batch, tell_of: Callable[[BatchProgress, str], None]) -> BatchProgress:
    """Until it is done. Raises what has ended it."""
    pace = Pace()
    while not wait([batch.done], LOOK_SECONDS).done:
        progress = batch.progress
        tell_of(progress, pace.of(progress, time.monotonic()))
    return batch.wait()


class Pace:
    """How many lines end a second, by those of the last half minute: and when all have at that rate."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def of(self, progress: BatchProgress, now: float) -> str:
        """ "" where it is not known. What had ended before this run, or was found so, did not end in it."""
        if progress.ended_before is None:
            return ""
        if not self._seen:
            self._seen.append((now, progress.ended_before))
        self._seen.append((now, progress.ended))
        while self._seen[0][0] < now - PACE_SECONDS:
            self._seen.popleft()
        since, before = self._seen[0]
        if now < since + LEAST_PACE_SECONDS:
            return ""
        rate = (progress.ended - before) / (now - since)
        told = f"{rate:,.0f} lines/s" if rate >= 10 else f"{rate:.1f} lines/s"
        if rate and progress.has_worker and progress.expected is not None:
            seconds = (progress.expected - progress.ended) / rate
            told += f", done in about {timedelta(seconds=round(seconds))}"
        return told


@contextmanager
def telling() -> Iterator[Callable[[BatchProgress, str], None]]:
    """How far it is and how fast, to standard error: a bar at a terminal, a line now and then elsewhere."""
    console = OurConsole(sys.stderr)
    if not sys.stderr.isatty() or console.is_dumb_terminal:
        told_at, told = time.monotonic(), ""

        def tell_line(progress: BatchProgress, pace: str) -> None:
            nonlocal told_at, told
            now, news = time.monotonic(), waits_for(progress)
            if now >= told_at + (NEWS_SECONDS if news and not told else LINE_SECONDS):
                told_at, told = now, news
                tell(escaped(in_a_line(progress, pace)), err=True)

        yield tell_line
        return
    # With what draws, which no other command needs.
    from rich.constrain import Constrain
    from rich.live import Live
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    with Live(
        console=console, transient=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
    ) as screen:

        def draw(progress: BatchProgress, pace: str) -> None:
            bar = ProgressBar(total=progress.expected, completed=progress.ended, pulse=progress.expected is None)
            shown = Table.grid()
            for each in bar, Text(escaped(in_a_line(progress, pace))):
                shown.add_row(each)
            # The last columns are left to a typed ^C, which else would break the line.
            screen.update(Constrain(shown, console.width - 2), refresh=True)

        yield draw


def in_a_line(progress: BatchProgress, pace: str) -> str:
    """What it waits for goes last."""
    return "; ".join(filter(None, [", ".join(filter(None, [how_far(progress), pace])), waits_for(progress)]))


def how_far(progress: BatchProgress) -> str:
    of = f"{progress.lines:,} or more"
    if progress.expected is not None:
        of = f"{'' if progress.is_read else 'about '}{progress.expected:,}"
    return f"{progress.ended:,} of {of} lines, {progress.failed:,} failed, {progress.in_flight:,} in flight"


def waits_for(progress: BatchProgress) -> str:
    """Beside answers."""
    trouble = progress.trouble.removesuffix(".")
    return "; ".join(filter(None, [trouble, "" if progress.has_worker else "no worker is ready"]))
