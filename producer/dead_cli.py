"""`keye dead`: the operator's way through the jobs that failed for good, and the messages that nobody could read."""

import json
import re
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Annotated, Any

import typer
from pydantic_core import to_jsonable_python

from keye.config.codes import ErrorCode
from keye.config.contract import escaped
from keye.config.faults import (
    DeadLetterNotFound,
    InvalidJob,
    JobUnreadable,
    KeyeError,
    MessageNotFound,
    QueueFull,
    QueueUnavailable,
    UnknownSchemaVersion,
)
from keye.config.quarantine import QuarantinedMessage
from keye.producer.client import Client
from keye.producer.dead_letters import DeadLetter
from keye.producer.shell import AsJson, CommandLine, ExitCode, RedisUrl, confirmed, connected, tell
from keye.producer.transport import is_refusal

app = CommandLine(
    "keye",
    help="Look through the jobs that failed for good, and send them again; or through messages that nobody could read.",
)

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_period(text: str) -> float:
    """Seconds in `90s`, `30m`, `2h` or `7d`."""
    match = re.fullmatch(r"(\d+)([smhd])", text)
    if match is None:
        raise typer.BadParameter(f"{text!r} is no period: write 90s, 30m, 2h or 7d")
    return int(match[1]) * _SECONDS[match[2]]


Codes = Annotated[
    list[ErrorCode] | None, typer.Option("--code", metavar="CODE", help="only with this error code; may be repeated")
]
Since = Annotated[
    float | None, typer.Option(parser=parse_period, metavar="PERIOD", help="only of the last 90s, 30m, 2h or 7d")
]
Ids = Annotated[list[str] | None, typer.Argument(help="which ones; or choose by --code, --since or --all")]
All = Annotated[bool, typer.Option("--all", help="every dead letter; with --messages, every quarantined message")]
Messages = Annotated[bool, typer.Option("--messages", help="of the messages that no worker could read")]


@app.command("list")
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
    faults: list[KeyeError] = []
    with connected(redis_url) as client:
        for found in select(client, code, since, messages):
            if as_json:
                tell(json.dumps(as_dict(found, faults)))
            else:
                tell(escaped(in_a_line(found, faults)), hang=2)
    exit_if_any(faults)


@app.command()
def show(
    job_or_message_id: Annotated[str, typer.Argument(metavar="ID", help="of a job that failed, or of a message")],
    messages: Messages = False,
    as_json: AsJson = False,
    redis_url: RedisUrl = None,
) -> None:
    """What the job asked for, and what went wrong in each of its attempts; or the quarantined message, and why."""
    faults: list[KeyeError] = []
    with connected(redis_url) as client:
        found = find(client, job_or_message_id, messages)
    if as_json:
        content = content_of(found) if isinstance(found, QuarantinedMessage) else {}
        tell(json.dumps(as_dict(found, faults) | content, indent=2))
    else:
        tell("\n".join(map(escaped, (in_a_line(found, faults), *details_of(found, faults)))), hang=2)
    exit_if_any(faults)


@app.command()
def requeue(
    ids: Ids = None,
    code: Codes = None,
    since: Since = None,
    every: Annotated[bool, typer.Option("--all", help="every dead letter")] = False,
    max_pixels: Annotated[int | None, typer.Option(help="for every image, and every frame of a video")] = None,
    fps: Annotated[float | None, typer.Option(help="frames a second, for every video")] = None,
    as_json: AsJson = False,
    redis_url: RedisUrl = None,
) -> None:
    """Send jobs once more, as new jobs; prints the old id and the new one, or why one cannot be sent."""
    require_one_choice(ids, code, since, every)
    faults: list[KeyeError] = []
    with connected(redis_url) as client:
        letters = client.dead_letters
        # Read whole before anything is done to them, here and below.
        chosen = [letters.find(each) for each in ids] if ids else list(letters.select(code or (), since))
        for letter in chosen:
            told = {"job_id": letter.job_id, "requeued_as": None}
            with sparing_the_others(letter.job_id, faults):
                told["requeued_as"] = letters.requeue(letter, max_pixels, fps).id
            if as_json:
                tell(json.dumps(told if told["requeued_as"] else told | {"error": str(faults[-1])}))
            elif told["requeued_as"]:
                tell(escaped(f"{letter.job_id} -> {told['requeued_as']}"))
    exit_if_any(faults)


@app.command()
def purge(
    ids: Ids = None,
    code: Codes = None,
    since: Since = None,
    every: All = False,
    messages: Messages = False,
    is_sure: Annotated[bool, typer.Option("--yes", help="do not ask before those of --code, --since or --all")] = False,
    as_json: AsJson = False,
    redis_url: RedisUrl = None,
) -> None:
    """Forget jobs (their input, their failure, all of it) or quarantined messages. Prints their ids.

    Those that are not named one by one it counts, and asks.
    """
    require_one_choice(ids, code, since, every)
    faults: list[KeyeError] = []
    with connected(redis_url) as client:
        chosen = [find(client, each, messages) for each in ids] if ids else list(select(client, code, since, messages))
        what = f"{len(chosen)} {'quarantined message' if messages else 'dead letter'}{'s' * (len(chosen) != 1)}"
        if not ids and chosen and not confirmed(f"Forget {what} for good?", is_sure):
            tell("None was forgotten.", err=True)
            return
        for each in chosen:
            if isinstance(each, QuarantinedMessage):
                client.quarantine.purge([each.message_id])
                tell(json.dumps({"message_id": each.message_id}) if as_json else escaped(each.message_id))
                continue
            with sparing_the_others(each.job_id, faults):
                client.dead_letters.purge(each)
                tell(json.dumps({"job_id": each.job_id}) if as_json else escaped(each.job_id))
    exit_if_any(faults)


@contextmanager
def sparing_the_others(job_id: str, faults: list[KeyeError]) -> Iterator[None]:
    """What is wrong with this one is told and noted, and the next is seen to; what stops them too ends the command."""
    try:
        yield
    except KeyeError as fault:
        if isinstance(fault, QueueFull) or (isinstance(fault, QueueUnavailable) and not is_refusal(fault)):
            raise
        tell(escaped(f"{job_id}: {fault}"), err=True)
        faults.append(fault)


def exit_if_any(faults: list[KeyeError]) -> None:
    if faults:
        raise typer.Exit(ExitCode.of(faults[0]))


def require_one_choice(ids: list[str] | None, codes: list[ErrorCode] | None, since: float | None, every: bool) -> None:
    if sum((bool(ids), bool(codes) or since is not None, every)) != 1:
        raise typer.BadParameter("name the ids, or choose by --code and --since, or take --all: one of the three")


def select(
    client: Client, codes: list[ErrorCode] | None, since: float | None, messages: bool
) -> Iterator[DeadLetter | QuarantinedMessage]:
    if not messages:
        return client.dead_letters.select(codes or (), since)
    if codes:
        raise typer.BadParameter("messages have no code: give either --code or --messages, not both")
    return client.quarantine.select(since)


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


def in_a_line(found: DeadLetter | QuarantinedMessage, faults: list[KeyeError]) -> str:
    """With why what should stand there cannot be read, which is then among the `faults`, here and below."""
    if isinstance(found, DeadLetter):
        try:
            failure = found.failure
            what = f"{failure.code} in {failure.stage}: {failure.message}"
        except JobUnreadable as unreadable:
            what = f"unreadable: {unreadable}"
            faults.append(unreadable)
        return f"{found.job_id}  {moment(found.ended_at)}  {what}"
    line = f"{found.message_id}  {moment(found.quarantined_at)}  {found.size:,} bytes  {found.reason}"
    return line if found.job_id is None else f"{line}  (job {found.job_id})"


def details_of(found: DeadLetter | QuarantinedMessage, faults: list[KeyeError]) -> Iterator[str]:
    """The lines below that one."""
    if isinstance(found, DeadLetter):
        yield describe_job(found)
        try:
            attempts = found.attempts
        except JobUnreadable as unreadable:
            yield f"unreadable: {unreadable}"
            faults.append(unreadable)
            return
        for each in attempts:
            yield (
                f"attempt {each.attempt}: {moment(each.began_at)}, {each.ended_at - each.began_at:.1f} s, "
                f"{each.worker}, in stage {each.stage}: {each.code}: {each.message}"
            )
        return
    yield f"put there by {found.worker}; this is what lay in the queue:"
    yield text_of(found)
    if (num_cut := found.size - len(found.raw)) > 0:
        yield f"... cut here: these are the first {len(found.raw):,} bytes, {num_cut:,} more were not kept"


def describe_job(letter: DeadLetter) -> str:
    """The questions and the media in a line; what cannot be read says so."""
    try:
        job = letter.job
    except (InvalidJob, JobUnreadable, UnknownSchemaVersion) as unreadable:
        return f"unreadable: {unreadable}"
    uris = [part.uri if len(part.uri) < 200 else f"{part.uri[:40]}..." for part in job.all_media()]
    prompts = [each.prompt for each in job.questions] if job.prompt is None else [job.prompt]
    asked = [json.dumps(prompt, ensure_ascii=False) for prompt in prompts]
    return " ".join([*(["(chat messages)"] if job.messages else []), *asked, *uris])


def as_dict(found: DeadLetter | QuarantinedMessage, faults: list[KeyeError]) -> dict[str, Any]:
    """What cannot be read of a letter is None, and `unreadable` says why."""
    if isinstance(found, QuarantinedMessage):
        return {**to_jsonable_python(found, exclude={"raw"}), "quarantined_at": found.quarantined_at}
    facts: dict[str, Any] = {"job_id": found.job_id, "ended_at": found.ended_at}
    for name in ("failure", "attempts", "sealed"):
        try:
            # `sealed` may be nothing that pydantic would write.
            facts[name] = found.sealed if name == "sealed" else to_jsonable_python(getattr(found, name))
        except JobUnreadable as unreadable:
            facts |= {name: None, "unreadable": str(unreadable)}
            faults.append(unreadable)
    return facts


def content_of(message: QuarantinedMessage) -> dict[str, Any]:
    raw = message.raw
    return {"is_cut": message.size > len(raw), "text": text_of(message), "raw_base64": b64encode(raw).decode()}


def text_of(message: QuarantinedMessage) -> str:
    return message.raw.decode("utf-8", "backslashreplace")


def moment(at: float) -> str:
    try:
        return f"{datetime.fromtimestamp(at):%Y-%m-%d %H:%M:%S}"
    except (ValueError, OverflowError, OSError):
        # A stranger's, which no calendar has.
        return f"{at:g}"
