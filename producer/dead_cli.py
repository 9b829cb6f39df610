"""`keye dead`: the operator's way through the jobs that failed for good, and the messages that nobody could read."""

import json
import re
from base64 import b64encode
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any

import typer

from keye.config.codes import ErrorCode
from keye.config.contract import escaped
from keye.config.faults import DeadLetterNotFound, MessageNotFound
from keye.config.quarantine import QuarantinedMessage
from keye.producer.client import Client
from keye.producer.dead_letters import DeadLetter, describe_job
from keye.producer.shell import EXIT_CODES, AsJson, RedisUrl, connected

app = typer.Typer(
    no_args_is_help=True,
    help="Look through the jobs that failed for good, and send them again; or through messages that nobody could read.",
)

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_period(text: str) -> float:
    """Seconds in `90s`, `30m`, `2h` or `7d`."""
    match = re.fullmatch(r"(\d+)([smhd])", text)
    if match is None:
        raise typer.BadParameter(f"{text!r} is no period: write 90s, 30m, 2h or 7d")
    return int(match[1]) * _SECONDS[match[2]]


Codes = Annotated[list[ErrorCode] | None, typer.Option("--code", help="only with this code; may be repeated")]
Since = Annotated[
    float | None, typer.Option(parser=parse_period, metavar="PERIOD", help="only of the last 90s, 30m, 2h or 7d")
]
JobIds = Annotated[list[str] | None, typer.Argument(help="which jobs; or choose by --code, --since or --all")]
Ids = Annotated[list[str] | None, typer.Argument(help="which jobs or messages; or choose by --code, --since or --all")]
All = Annotated[bool, typer.Option("--all", help="every dead letter; with --messages, every quarantined message")]
Messages = Annotated[bool, typer.Option("--messages", help="of the messages that no worker could read")]


@app.command("list", epilog=EXIT_CODES)
def list_letters(
    code: Codes = None,
    since: Since = None,
    messages: Messages = False,
    as_json: AsJson = False,
    redis_url: RedisUrl = None,
) -> None:
    """One line for each job that failed, oldest first; with --json, all of it, one job a line.

    With --messages, one for each quarantined message, without its content: `keye dead show` has that.
    """
    refuse_code_of_messages(code, messages)
    with connected(redis_url) as client:
        if messages:
            for message in client.quarantine.select(since):
                typer.echo(json.dumps(facts_of(message)) if as_json else facts_in_a_line(message))
        else:
            for letter in client.dead_letters.select(code or (), since):
                typer.echo(json.dumps(as_dict(letter)) if as_json else in_a_line(letter))


@app.command(epilog=EXIT_CODES)
def show(
    job_or_message_id: Annotated[str, typer.Argument(metavar="ID", help="of a job that failed, or of a message")],
    messages: Messages = False,
    as_json: AsJson = False,
    redis_url: RedisUrl = None,
) -> None:
    """What the job asked for, and what went wrong in each of its attempts; or the quarantined message, and why."""
    with connected(redis_url) as client:
        found = find(client, job_or_message_id, messages)
    if isinstance(found, QuarantinedMessage):
        typer.echo(json.dumps(facts_of(found) | content_of(found), indent=2) if as_json else in_full(found))
        return
    if as_json:
        typer.echo(json.dumps(as_dict(found), indent=2))
        return
    typer.echo(f"{in_a_line(found)}\n{escaped(describe_job(found))}")
    for attempt in found.attempts:
        began_at = datetime.fromtimestamp(attempt.began_at)
        line = (
            f"attempt {attempt.attempt}: {began_at:%Y-%m-%d %H:%M:%S}, {attempt.ended_at - attempt.began_at:.1f} s, "
            f"{attempt.worker}, in stage {attempt.stage}: {attempt.code}: {attempt.message}"
        )
        typer.echo(escaped(line))


@app.command(epilog=EXIT_CODES)
def requeue(
    job_ids: JobIds = None,
    code: Codes = None,
    since: Since = None,
    every: Annotated[bool, typer.Option("--all", help="every dead letter")] = False,
    max_pixels: Annotated[int | None, typer.Option(help="for every image, and every frame of a video")] = None,
    fps: Annotated[float | None, typer.Option(help="frames a second, for every video")] = None,
    as_json: AsJson = False,
    redis_url: RedisUrl = None,
) -> None:
    """Send jobs once more, as new jobs; prints the old id and the new one."""
    require_one_choice(job_ids, code, since, every)
    with connected(redis_url) as client:
        for letter in chosen(client, job_ids, code, since):
            job = client.dead_letters.requeue(letter, max_pixels, fps)
            ids = {"job_id": letter.job_id, "requeued_as": job.id}
            typer.echo(json.dumps(ids) if as_json else f"{letter.job_id} -> {job.id}")


@app.command(epilog=EXIT_CODES)
def purge(
    ids: Ids = None,
    code: Codes = None,
    since: Since = None,
    every: All = False,
    messages: Messages = False,
    redis_url: RedisUrl = None,
) -> None:
    """Forget jobs (their input, their failure, all of it) or quarantined messages. Prints their ids."""
    refuse_code_of_messages(code, messages)
    require_one_choice(ids, code, since, every)
    with connected(redis_url) as client:
        unwanted: Sequence[DeadLetter | QuarantinedMessage]
        if ids:
            unwanted = [find(client, each, messages) for each in ids]
        elif messages:
            unwanted = list(client.quarantine.select(since))
        else:
            unwanted = chosen(client, None, code, since)
        for each in unwanted:
            if isinstance(each, QuarantinedMessage):
                client.quarantine.purge([each.message_id])
                typer.echo(each.message_id)
            else:
                client.dead_letters.purge(each)
                typer.echo(each.job_id)


def require_one_choice(ids: list[str] | None, codes: list[ErrorCode] | None, since: float | None, every: bool) -> None:
    if sum((bool(ids), bool(codes) or since is not None, every)) != 1:
        raise typer.BadParameter("name the ids, or choose by --code and --since, or take --all: one of the three")


def refuse_code_of_messages(codes: list[ErrorCode] | None, messages: bool) -> None:
    if codes and messages:
        raise typer.BadParameter("messages have no code: give either --code or --messages, not both")


def chosen(
    client: Client, job_ids: list[str] | None, codes: list[ErrorCode] | None, since: float | None
) -> list[DeadLetter]:
    """Read whole before anything is done to them."""
    if job_ids:
        return [client.dead_letters.find(job_id) for job_id in job_ids]
    return list(client.dead_letters.select(codes or (), since))


def find(client: Client, job_or_message_id: str, only_messages: bool) -> DeadLetter | QuarantinedMessage:
    """A dead letter before a message. Raises `DeadLetterNotFound` where it is neither, or `MessageNotFound`."""
    if only_messages:
        return client.quarantine.find(job_or_message_id)
    try:
        return client.dead_letters.find(job_or_message_id)
    except DeadLetterNotFound as no_letter:
        try:
            return client.quarantine.find(job_or_message_id)
        except MessageNotFound:
            raise no_letter from None


def in_a_line(letter: DeadLetter) -> str:
    ended_at = datetime.fromtimestamp(letter.ended_at)
    failure = letter.failure
    line = f"{letter.job_id}  {ended_at:%Y-%m-%d %H:%M:%S}  {failure.code} in {failure.stage}: {failure.message}"
    return escaped(line)


def as_dict(letter: DeadLetter) -> dict[str, Any]:
    return {
        "job_id": letter.job_id,
        "ended_at": letter.ended_at,
        "failure": letter.failure.model_dump(mode="json"),
        "attempts": [attempt.model_dump(mode="json") for attempt in letter.attempts],
        "sealed": letter.sealed,
    }


def facts_in_a_line(message: QuarantinedMessage) -> str:
    quarantined_at = datetime.fromtimestamp(message.quarantined_at)
    job = "" if message.job_id is None else f"  (job {message.job_id})"
    return escaped(
        f"{message.message_id}  {quarantined_at:%Y-%m-%d %H:%M:%S}  {message.size:,} bytes  {message.reason}{job}"
    )


def in_full(message: QuarantinedMessage) -> str:
    num_cut = message.size - len(message.raw)
    lines = [facts_in_a_line(message), escaped(f"put there by {message.worker}; this is what lay in the queue:")]
    lines.append(escaped(text_of(message)))
    if num_cut > 0:
        lines.append(f"... cut here: these are the first {len(message.raw):,} bytes, {num_cut:,} more were not kept")
    return "\n".join(lines)


def facts_of(message: QuarantinedMessage) -> dict[str, Any]:
    return message.model_dump(mode="json", exclude={"raw"}) | {"quarantined_at": message.quarantined_at}


def content_of(message: QuarantinedMessage) -> dict[str, Any]:
    raw = message.raw
    return {"is_cut": message.size > len(raw), "text": text_of(message), "raw_base64": b64encode(raw).decode()}


def text_of(message: QuarantinedMessage) -> str:
    return message.raw.decode("utf-8", "backslashreplace")
