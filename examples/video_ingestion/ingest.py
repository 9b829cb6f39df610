"""Caption and tag every video below a prefix of a bucket, and new ones as they come: `ingest.py S3-URI DATABASE`.

`ingest.py s3://footage/cameras/ videos.db` needs `pip install 'keye-worker[upload]'`, KEYE_REDIS_URL and credentials as
boto3 finds them, and KEYE_S3_ENDPOINT_URL where the store is not Amazon's. Whatever ended it, even kill -9: start it
again. What it knows stands in the table `videos`, and an object that it sent without getting to write that down is
still the same job, by its idempotency key.
"""

import hashlib
import os
import re
import sqlite3
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import closing
from typing import Any

import boto3

from keye import Client, Job, JobFailure, JobNotFound, JobResult, QueueFull, QueueUnavailable, Refusal

PROMPT = """Describe the video in two lines:
CAPTION: one sentence that says what happens
TAGS: three to eight keywords, separated by commas"""
ROUND_SECONDS = 10
SENT_IN_A_ROUND = 1000
TABLE = """
create table if not exists videos (
    uri text primary key,
    etag text not null,
    state text not null,  -- LISTED, REFUSED, or its job's: QUEUED from then on until it has ended
    job_id text,
    caption text,
    tags text,            -- separated by commas
    code text             -- why there is no caption
)"""
LISTED = """
insert into videos (uri, etag, state) values (?, ?, 'LISTED')
on conflict (uri) do update
set etag = excluded.etag, state = 'LISTED', job_id = null, caption = null, tags = null, code = null
where etag <> excluded.etag"""


def list_objects(db: sqlite3.Connection, pages: Iterable[Mapping[str, Any]], bucket: str) -> None:
    """Gives each object a row, and a fresh one to each that was written anew."""
    for page in pages:
        with db:
            found = ((f"s3://{bucket}/{each['Key']}", each["ETag"]) for each in page.get("Contents", ()))
            db.executemany(LISTED, found)


def submit(db: sqlite3.Connection, client: Client) -> float:
    """Sends what is listed; returns for how many seconds the queue asks to be left alone."""
    rows = db.execute("select uri, etag from videos where state = 'LISTED' limit ?", (SENT_IN_A_ROUND,)).fetchall()
    answers = client.submit_many(
        {
            "prompt": PROMPT,
            "media": [uri],
            "priority": "low",
            "idempotency_key": hashlib.sha256(f"{uri} {etag} {PROMPT}".encode()).hexdigest(),
        }
        for uri, etag in rows
    )
    pause = 0.0
    with db:
        for (uri, _), answer in zip(rows, answers, strict=True):
            match answer:
                case QueueFull():
                    pause = max(pause, answer.retry_after_seconds)
                case QueueUnavailable():
                    pass  # Still listed: the next round sends it.
                case Refusal():
                    code = type(answer).__name__
                    db.execute("update videos set state = 'REFUSED', code = ? where uri = ?", (code, uri))
                case Job():
                    db.execute("update videos set state = 'QUEUED', job_id = ? where uri = ?", (answer.id, uri))
    return pause


def collect(db: sqlite3.Connection, client: Client, seconds: float) -> None:
    """Writes down how jobs end, of those sent before the last start too."""
    sent = [job_id for (job_id,) in db.execute("select job_id from videos where state = 'QUEUED'")]
    for job, outcome in client.results(sent, timeout=seconds):
        match outcome:
            case JobResult():
                values = (outcome.state, *read_answer(outcome.answer), None)
            case JobFailure():
                values = (outcome.state, None, None, outcome.code)
            case JobNotFound():
                values = ("LISTED", None, None, None)  # Its outcome has expired unread.
            case _:
                continue  # Not ended yet, or Redis is away.
        with db:
            db.execute(
                "update videos set state = ?, caption = ?, tags = ?, code = ? where job_id = ?", (*values, job.id)
            )


def read_answer(answer: str) -> tuple[str, str]:
    """Caption and tags. A model need not keep to the form: without a caption's line all of it is the caption."""
    lines = {name.lower(): text for name, text in re.findall(r"(?im)^\W*(caption|tags)\W+(.*\S)", answer)}
    tags = dict.fromkeys(tag.strip(" .#*").lower() for tag in re.split("[,;，、]", lines.get("tags", "")))  # noqa: RUF001
    return lines.get("caption", answer.strip()), ", ".join(filter(None, tags))


def main(uri: str, database: str) -> None:
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    s3 = boto3.client("s3", endpoint_url=os.environ.get("KEYE_S3_ENDPOINT_URL"))
    listing = s3.get_paginator("list_objects_v2")
    with Client() as client, closing(sqlite3.connect(database)) as db:
        db.execute(TABLE)
        while True:
            ends_at = time.monotonic() + ROUND_SECONDS
            list_objects(db, listing.paginate(Bucket=bucket, Prefix=prefix), bucket)
            ends_at += submit(db, client)
            collect(db, client, ends_at - time.monotonic())
            time.sleep(max(0, ends_at - time.monotonic()))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
