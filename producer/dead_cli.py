"""`keye dead`: the operator's way through the jobs that failed for good."""

import json
import re
from datetime import datetime
from typing import Annotated, Any

import typer

from config.error_codes import ErrorCode
from producer.client import Client
from producer.dead_letters import DeadLetter, describe_job
from producer.shell import EXIT_CODES, AsJson, RedisUrl, connected

app = typer.Typer(no_args_is_help=True, help="Look through the jobs that failed for good; send them again.")

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
All = Annotated[bool, typer.Option("--all", help="every dead letter")]


@app.command("list", epilog=EXIT_CODES)
def list_letters(code: Codes = None, since: Since = None, as_json: AsJson = False, redis_url: RedisUrl = None) -> None:
    """One line for each job that failed, oldest first; with --json, all of it, one job a line."""
    with connected(redis_url) as client:
        for letter in client.dead_letters.select(code or (), since):
            typer.echo(json.dumps(as_dict(letter)) if as_json else in_a_line(letter))


@app.command(epilog=EXIT_CODES)
def show(job_id: str, as_json: AsJson = False, redis_url: RedisUrl = None) -> None:
    """What the job asked for, and what went wrong in each of its attempts."""
    with connected(redis_url) as client:
        letter = client.dead_letters.find(job_id)
    if as_json:
        typer.echo(json.dumps(as_dict(letter), indent=2))
        return
    typer.echo(f"{in_a_line(letter)}\n{describe_job(letter)}")
    for attempt in letter.attempts:
        began_at = datetime.fromtimestamp(attempt.began_at)
        typer.echo(
            f"attempt {attempt.attempt}: {began_at:%Y-%m-%d %H:%M:%S}, {attempt.ended_at - attempt.began_at:.1f} s, "
            f"{attempt.worker}, in stage {attempt.stage}: {attempt.code}: {attempt.message}"
        )


@app.command(epilog=EXIT_CODES)
def requeue(
    job_ids: JobIds = None,
    code: Codes = None,
    since: Since = None,
    every: All = False,
    max_pixels: Annotated[int | None, typer.Option(help="for every image, and every frame of a video")] = None,
    fps: Annotated[float | None, typer.Option(help="frames a second, for every video")] = None,
    as_json: AsJson = False,
    redis_url: RedisUrl = None,
) -> None:
    """Send jobs once more, as new jobs; prints the old id and the new one."""
    with connected(redis_url) as client:
        for letter in chosen(client, job_ids, code, since, every):
            job = client.dead_letters.requeue(letter, max_pixels, fps)
            ids = {"job_id": letter.job_id, "requeued_as": job.id}
            typer.echo(json.dumps(ids) if as_json else f"{letter.job_id} -> {job.id}")


@app.command(epilog=EXIT_CODES)
def purge(
    job_ids: JobIds = None, code: Codes = None, since: Since = None, every: All = False, redis_url: RedisUrl = None
) -> None:
    """Forget jobs: their input, their failure, all of it. Prints their ids."""
    with connected(redis_url) as client:
        for letter in chosen(client, job_ids, code, since, every):
            client.dead_letters.purge(letter)
            typer.echo(letter.job_id)


def chosen(
    client: Client, job_ids: list[str] | None, codes: list[ErrorCode] | None, since: float | None, every: bool
) -> list[DeadLetter]:
    """Read whole before anything is done to them."""
    if sum((bool(job_ids), bool(codes) or since is not None, every)) != 1:
        raise typer.BadParameter("name the jobs, or choose them by --code and --since, or take --all: one of the three")
    if job_ids:
        return [client.dead_letters.find(job_id) for job_id in job_ids]
    return list(client.dead_letters.select(codes or (), since))


def in_a_line(letter: DeadLetter) -> str:
    ended_at = datetime.fromtimestamp(letter.ended_at)
    failure = letter.failure
    return f"{letter.job_id}  {ended_at:%Y-%m-%d %H:%M:%S}  {failure.code} in {failure.stage}: {failure.message}"


def as_dict(letter: DeadLetter) -> dict[str, Any]:
    return {
        "job_id": letter.job_id,
        "ended_at": letter.ended_at,
        "failure": letter.failure.model_dump(mode="json"),
        "attempts": [attempt.model_dump(mode="json") for attempt in letter.attempts],
        "sealed": letter.sealed,
    }
