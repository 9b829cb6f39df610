"""`keye`: the client for shells and scripts. Arguments in, text or JSON out, a typed exit code; nothing else."""

import codecs
import json
import os
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from keye.config.contract import escaped
from keye.config.event import Heartbeat
from keye.config.faults import InvalidJob, JobFailed, QueueUnavailable, Refusal
from keye.config.job import Priority, Thinking
from keye.config.wire import SealedJob, schemas
from keye.producer import batch_cli, dead_cli, jobs_cli
from keye.producer.batch.lines import read_fields
from keye.producer.job import Cancellation, Job
from keye.producer.many import batches
from keye.producer.replay import differences
from keye.producer.shell import (
    Also,
    AsJson,
    ExitCode,
    RedisUrl,
    SchemaFile,
    asked_of,
    command_line,
    connected,
    list_codes,
    read_schema,
    tell,
    telling_how_to_go_on,
)
from keye.producer.transcript import Transcript, end_if_unanswered, tell_answers

app = command_line("keye", "Send analysis jobs to Keye-VL workers and read their answers.", list_codes(ExitCode))
app.add_typer(batch_cli.app, name="batch")
app.add_typer(dead_cli.app, name="dead")
app.command("list")(jobs_cli.list_jobs)
app.command("top")(jobs_cli.top)

JobId = Annotated[str, typer.Argument(help="what `keye submit` printed")]
OneJobId = Annotated[str | None, typer.Argument(metavar="JOB_ID", help="what `keye submit` printed")]
RetryFailed = Annotated[
    bool, typer.Option("--retry-failed", help="queue it anew where the key's job ended without an answer")
]
Timeout = Annotated[float | None, typer.Option(help="seconds to wait; default: as long as it takes")]

# How often whoever watches a queued job hears where it stands.
PLACE_SECONDS = 3.0


@app.command()
def submit(
    prompt: Annotated[
        str | None, typer.Argument(help="the question, - for standard input; left out with --job")
    ] = None,
    media: Annotated[list[str] | None, typer.Argument(help="images and videos in order: files or URIs")] = None,
    also: Also = None,
    response_schema: SchemaFile = None,
    thinking: Annotated[
        Thinking, typer.Option(metavar="MODE", help=f"whether it reasons before it answers: {', '.join(Thinking)}")
    ] = Thinking.AUTO,
    max_new_tokens: Annotated[int | None, typer.Option(help="longest answer, in tokens")] = None,
    max_thinking_tokens: Annotated[int | None, typer.Option(help="longest thinking, in tokens")] = None,
    priority: Annotated[
        Priority, typer.Option(metavar="LEVEL", help=f"which queued jobs go first: {', '.join(Priority)}")
    ] = Priority.NORMAL,
    deadline_seconds: Annotated[float | None, typer.Option(help="give the job up after this long")] = None,
    idempotency_key: Annotated[str | None, typer.Option(help="the same key and job is queued only once")] = None,
    retry_failed: RetryFailed = False,
    traceparent: Annotated[str | None, typer.Option(help="of W3C: the trace it belongs to, for workers' logs")] = None,
    result_ttl_seconds: Annotated[int | None, typer.Option(help="forget it so long after its end")] = None,
    job_file: Annotated[
        typer.FileBinaryRead | None,
        typer.Option("--job", metavar="FILE", help="a whole job as JSON, - for standard input"),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="wait for the answer and print it")] = False,
    timeout: Timeout = None,
    as_json: AsJson = False,
    redis_url: RedisUrl = None,
) -> None:
    """Queue a job and print its id."""
    if (prompt is None) == (job_file is None):
        raise typer.BadParameter("give either a prompt, or a whole job with --job")
    with connected(redis_url) as client:
        if job_file is not None:
            fields = read_fields(job_file.read())
        else:
            options = {"max_new_tokens": max_new_tokens, "max_thinking_tokens": max_thinking_tokens}
            fields = {
                **asked_of(prompt, also),
                "media": media,
                "response_schema": read_schema(response_schema),
                "thinking": thinking,
                "generation": {name: value for name, value in options.items() if value is not None},
                "priority": priority,
                "deadline_seconds": deadline_seconds,
                "idempotency_key": idempotency_key,
                "traceparent": traceparent,
                "result_ttl_seconds": result_ttl_seconds,
            }
        # It has an id before it is sent, for who ends the sending.
        (sealed,) = client.seal_all([fields])
        if isinstance(sealed, Refusal):
            raise sealed
        with telling_how_to_go_on(sealed.job_id, "may be queued"):
            (job,) = client.send([sealed], retry_failed)
        if isinstance(job, Refusal):
            raise job
        if wait:
            with telling_how_to_go_on(job.id, "goes on", QueueUnavailable):
                print_result(job, timeout, as_json)
        else:
            tell(json.dumps({"job_id": job.id}) if as_json else escaped(job.id))


@app.command()
def submit_many(
    jobs: Annotated[
        typer.FileBinaryRead, typer.Argument(metavar="FILE", help="a job as JSON in each line, - for standard input")
    ],
    retry_failed: RetryFailed = False,
    as_json: AsJson = False,
    redis_url: RedisUrl = None,
) -> None:
    """Queue many jobs and print their ids, a line each: an empty one for a job that was not accepted.

    Blank lines are no jobs, and have none.
    """
    refusals = []
    numbers: deque[int] = deque()

    def read() -> Iterator[dict[str, Any] | InvalidJob]:
        for number, line in enumerate(jobs, 1):
            text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if text.strip():
                numbers.append(number)
                yield read_fields(text)

    with connected(redis_url) as client:
        for batch in batches(client.seal_all(read())):
            with telling_what_may_be_queued(numbers, batch):
                answers = client.send(batch, retry_failed)
            for answer in answers:
                number = numbers.popleft()
                if isinstance(answer, Refusal):
                    refusals.append(answer)
                    tell(escaped(f"line {number}: {answer}"), err=True)
                tell(json.dumps({"line": number, "job_id": answer.id}) if as_json else escaped(answer.id or ""))
    if refusals:
        raise typer.Exit(ExitCode.of(refusals[0]))


@app.command()
def result(job_id: JobId, timeout: Timeout = None, as_json: AsJson = False, redis_url: RedisUrl = None) -> None:
    """Wait for a job and print its answer, or why there is none."""
    with telling_how_to_go_on(job_id), connected(redis_url) as client:
        print_result(client.find(job_id), timeout, as_json)


@app.command()
def watch(job_id: JobId, timeout: Timeout = None, as_json: AsJson = False, redis_url: RedisUrl = None) -> None:
    """Follow a job until it ends: where it stands in the queue, its stages, and its text as it is written.

    With --json, one event a line, and nothing else.
    """
    with telling_how_to_go_on(job_id), connected(redis_url) as client:
        job = client.find(job_id)
        if as_json:
            for said in job.events(timeout):
                tell(said.model_dump_json())
            job.result(timeout)
            return
        transcript = Transcript()
        tell(transcript.place(job.progress), end="")
        for event in job.events(timeout, heartbeat_seconds=PLACE_SECONDS):
            shown = transcript.place(job.progress) if isinstance(event, Heartbeat) else transcript.show(event)
            tell(shown, end="", is_styled=True)
        result = job.result(timeout)
        tell_answers(result, is_first_told=True)
        if transcript.has_gaps:
            tell(escaped(f"Text is missing above; all of it: keye result {job_id} --json"), hang=0)
        tell(f"{result.usage.completion_tokens} tokens in {result.timings.total:.2f} s")
        end_if_unanswered(result)


@app.command()
def replay(job_id: JobId, timeout: Timeout = None, as_json: AsJson = False, redis_url: RedisUrl = None) -> None:
    """Run a job again that was answered, as a new one with the same seed, and print what came out otherwise."""
    with connected(redis_url) as client:
        with telling_which(f"{job_id}, which was to be replayed"):
            before = client.find(job_id).result(timeout=0)
            job = client.replay(job_id)
        tell(escaped(f"{job_id} -> {job.id}"), err=True)
        with telling_which(f"{job.id}, its replay"), telling_how_to_go_on(job.id):
            after = job.result(timeout)
    found = differences(before, after)
    if as_json:
        told = [each._asdict() for each in found]
        tell(json.dumps({"job_id": job_id, "replayed_as": job.id, "is_same": not found, "differences": told}, indent=2))
    else:
        lines = [f"{what}: {before!r} -> {after!r}" for what, before, after in found]
        tell("\n".join(map(escaped, lines)) if found else "the same: media, model, generation and text")
        if before.generation is None:
            tell("The first answer does not tell its seed: a worker before 0.3 gave it.", err=True)
    if found:
        raise typer.Exit(ExitCode.DIFFERENT)


@app.command()
def cancel(
    job_id: OneJobId = None,
    all_queued: Annotated[bool, typer.Option("--all-queued", help="each that waits, and none that runs")] = False,
    is_sure: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
    as_json: AsJson = False,
    redis_url: RedisUrl = None,
) -> None:
    """Cancel a queued job, or ask the worker of a running one to stop; or cancel all that are queued."""
    if (job_id is None) is not all_queued:
        raise typer.BadParameter("give either a job, or --all-queued")
    with connected(redis_url) as client:
        if job_id is None:
            jobs_cli.cancel_all_queued(client, is_sure, as_json)
            return
        cancellation = client.find(job_id).cancel()
        tell(json.dumps({"job_id": job_id, "cancellation": cancellation}) if as_json else cancellation)
        if cancellation is Cancellation.ALREADY_ENDED:
            raise typer.Exit(ExitCode.TOO_LATE)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def plan(context: typer.Context) -> None:
    """Tell frames, sizes, tokens and memory that files would come to: `keye-worker plan`."""
    os.execv(sys.executable, [sys.executable, "-P", "-m", "keye.worker.daemon.entry", "plan", *context.args])


@app.command("status")
def show_status(job_id: OneJobId = None, as_json: AsJson = False, redis_url: RedisUrl = None) -> None:
    """Print the queues, the workers, what runs, and how long all of it will take; or how far one job is."""
    with connected(redis_url) as client:
        if job_id is not None:
            jobs_cli.show_job(client, job_id, as_json)
            return
        status = client.status()
    if as_json:
        tell(status.model_dump_json())
    else:
        tell("\n".join(status.lines()), hang=8)


@app.command("verify")
def verify_jobs(as_json: AsJson = False, redis_url: RedisUrl = None) -> None:
    """Read everything that Redis holds of jobs, and print each job that is in no legal state."""
    with connected(redis_url) as client:
        ledger, irregularities = client.verify()
    for found in irregularities:
        if as_json:
            tell(json.dumps(found._asdict()))
        else:
            tell(escaped("  ".join(found)), hang=2)
    counts = ", ".join(f"{number} {state}" for state, number in sorted(ledger.num_in_state.items()))
    summary = f"{len(ledger.records)} jobs ({counts}), {len(irregularities)} irregularities"
    summary += f", {ledger.num_quarantined} messages in quarantine"
    tell(escaped(summary) + (" (keye dead list --messages)" if ledger.num_quarantined else ""), err=True)
    if irregularities:
        raise typer.Exit(ExitCode.IRREGULAR)


@app.command()
def schema(
    folder: Annotated[Path | None, typer.Option("--write", help="write one file a schema into this folder")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON, as without it")] = False,
) -> None:
    """Print the JSON Schemas of jobs, outcomes and events, for producers in other languages."""
    if folder is None:
        tell(json.dumps(schemas(), indent=2))
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in schemas().items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


def print_result(job: Job, timeout: float | None, as_json: bool) -> None:
    try:
        answer = job.result(timeout)
    except JobFailed as failed:
        if not as_json:
            raise
        tell(failed.failure.model_dump_json(indent=2))
        raise typer.Exit(ExitCode.JOB_FAILED) from None
    if as_json:
        tell(answer.model_dump_json(indent=2))
    else:
        tell_answers(answer)
    end_if_unanswered(answer)


@contextmanager
def telling_which(job: str) -> Iterator[None]:
    """Of two jobs, the one that ended without an answer."""
    try:
        yield
    except JobFailed as failed:
        tell(escaped(f"{job}, ended without an answer. {failed}"), err=True)
        raise typer.Exit(ExitCode.JOB_FAILED) from None


@contextmanager
def telling_what_may_be_queued(numbers: deque[int], batch: list[SealedJob | Refusal]) -> Iterator[None]:
    """Of jobs whose ids are not printed yet, to who ends their sending by a signal."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        tell(f"Of lines {numbers[0]} to {numbers[len(batch) - 1]} all, some or none are queued.", err=True)
        raise
