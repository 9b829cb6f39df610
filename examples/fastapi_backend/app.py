"""A backend in front of Keye: a picture or clip is uploaded, or named on S3; the answer arrives while it is written.

`pip install 'keye-worker[examples]'`, set KEYE_REDIS_URL, then `uvicorn app:app --timeout-graceful-shutdown 3`. Without
that limit uvicorn's end waits for every open stream, and so for the longest job. With it streams are cut after 3 s, and
browsers take them up, where they were, at whichever process answers next.
What is larger than 1 MiB travels by way of S3: set KEYE_UPLOAD_PREFIX. Who may ask, how often, and about which buckets
is yours to add.
"""

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Form, Header, HTTPException, Request, UploadFile
from fastapi.responses import FileResponse, JSONResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent

from keye import (
    AsyncClient,
    AsyncJob,
    EventsMissing,
    InvalidEventId,
    InvalidJob,
    JobEvent,
    JobFailed,
    JobNotFound,
    KeyeError,
    QueueFull,
)

MAX_UPLOAD_BYTES = 64 * 2**20


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with AsyncClient() as app.state.keye:
        yield


app = FastAPI(lifespan=lifespan)


async def find(job_id: str, request: Request) -> AsyncJob:
    return await request.app.state.keye.find(job_id)


FoundJob = Annotated[AsyncJob, Depends(find)]


@app.get("/")
async def page() -> FileResponse:
    return FileResponse(Path(__file__).with_name("page.html"))


@app.post("/jobs", status_code=202)
async def submit(
    request: Request,
    question: Annotated[str, Form()],
    file: UploadFile | None = None,
    uri: Annotated[str, Form()] = "",
) -> dict[str, str]:
    if file:
        if file.size > MAX_UPLOAD_BYTES:
            raise HTTPException(413, f"The file has {file.size:,} bytes, the limit is {MAX_UPLOAD_BYTES:,}.")
        medium: Any = file.file
    elif uri.startswith("s3://"):
        medium = uri
    else:
        # No path: it would be of a file of this machine, or of one that the workers may read.
        raise HTTPException(422, "Give a file, or the URI of one that begins with s3://.")
    job = await request.app.state.keye.submit(prompt=question, media=[medium])
    return {"id": job.id}


@app.get("/jobs/{job_id}")
async def status(job: FoundJob) -> dict[str, Any]:
    """How far it is, and once it has ended, how: a result or a failure."""
    progress, outcome = await job.progress, None
    if progress.state.is_final:
        try:
            outcome = await job.result()
        except JobFailed as failed:
            outcome = failed.failure
    return {"progress": progress, "outcome": outcome}


async def follow(
    job: FoundJob, last_event_id: Annotated[str | None, Header()] = None
) -> AsyncIterator[JobEvent | EventsMissing]:
    return job.events(after=last_event_id)


@app.get("/jobs/{job_id}/events", response_class=EventSourceResponse)
async def events(followed: Annotated[Any, Depends(follow)]) -> AsyncIterator[ServerSentEvent]:
    """Each event under its id, which a browser that lost the stream gives back; FastAPI pings every 15 s."""
    async for event in followed:
        yield ServerSentEvent(id=event.id, data=event)


@app.delete("/jobs/{job_id}")
async def cancel(job: FoundJob) -> dict[str, str]:
    return {"cancellation": await job.cancel()}


@app.exception_handler(KeyeError)
async def refuse(request: Request, error: KeyeError) -> JSONResponse:
    match error:
        case JobNotFound():
            return JSONResponse({"detail": str(error)}, 404)
        case InvalidJob() | InvalidEventId():
            return JSONResponse({"detail": str(error)}, 422)
        case QueueFull():
            wait = {"Retry-After": str(math.ceil(error.retry_after_seconds))}
            return JSONResponse({"detail": "Too many questions are waiting. Ask again later."}, 503, wait)
        case _:
            return JSONResponse({"detail": "The queue cannot be reached. Ask again later."}, 503)
