"""The backend of examples/fastapi_backend, with its page, in Django: `uvicorn app:app --timeout-graceful-shutdown 3`.

`pip install 'keye-worker[examples]'`, and set KEYE_REDIS_URL. Streams want an ASGI server: under WSGI each holds a
thread. In a project of your own the views stay as they are; what its middleware asks for, such as a CSRF token, the
page has to send.
"""

import math
from collections.abc import AsyncIterator
from functools import cache
from pathlib import Path
from typing import Any

from django.conf import settings
from django.core.asgi import get_asgi_application
from django.http import HttpRequest, HttpResponse, JsonResponse, StreamingHttpResponse
from django.urls import path
from django.views import View

from keye import (
    AsyncClient,
    EventsMissing,
    Heartbeat,
    InvalidEventId,
    InvalidJob,
    JobEvent,
    JobFailed,
    JobNotFound,
    KeyeError,
    QueueFull,
)

PAGE = Path(__file__).parents[1] / "fastapi_backend" / "page.html"
MAX_UPLOAD_BYTES = 64 * 2**20


@cache
def keye() -> AsyncClient:
    """The process's one client, made by the first request: Django tells nobody that it starts or ends."""
    return AsyncClient()


class KeyeView(View):
    async def dispatch(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return await super().dispatch(*args, **kwargs)
        except JobNotFound as error:
            return JsonResponse({"detail": str(error)}, status=404)
        except (InvalidJob, InvalidEventId) as error:
            return JsonResponse({"detail": str(error)}, status=422)
        except QueueFull as error:
            wait = {"Retry-After": str(math.ceil(error.retry_after_seconds))}
            return JsonResponse(
                {"detail": "Too many questions are waiting. Ask again later."}, status=503, headers=wait
            )
        except KeyeError:
            return JsonResponse({"detail": "The queue cannot be reached. Ask again later."}, status=503)


class Page(View):
    async def get(self, request: HttpRequest) -> HttpResponse:
        return HttpResponse(PAGE.read_text())


class Jobs(KeyeView):
    async def post(self, request: HttpRequest) -> JsonResponse:
        uri, file = request.POST.get("uri", ""), request.FILES.get("file")
        if file and file.size > MAX_UPLOAD_BYTES:
            detail = f"The file has {file.size:,} bytes, the limit is {MAX_UPLOAD_BYTES:,}."
            return JsonResponse({"detail": detail}, status=413)
        if not file and not uri.startswith("s3://"):
            # No path: it would be of a file of this machine, or of one that the workers may read.
            return JsonResponse({"detail": "Give a file, or the URI of one that begins with s3://."}, status=422)
        job = await keye().submit(prompt=request.POST.get("question"), media=[file or uri])
        return JsonResponse({"id": job.id}, status=202)


class Job(KeyeView):
    async def get(self, request: HttpRequest, job_id: str) -> JsonResponse:
        job = await keye().find(job_id)
        progress, outcome = await job.progress, None
        if progress.state.is_final:
            try:
                outcome = await job.result()
            except JobFailed as failed:
                outcome = failed.failure
        told = {"progress": progress, "outcome": outcome}
        return JsonResponse({name: each and each.model_dump(mode="json") for name, each in told.items()})

    async def delete(self, request: HttpRequest, job_id: str) -> JsonResponse:
        job = await keye().find(job_id)
        return JsonResponse({"cancellation": await job.cancel()})


class Events(KeyeView):
    async def get(self, request: HttpRequest, job_id: str) -> StreamingHttpResponse:
        job = await keye().find(job_id)
        events = job.events(after=request.headers.get("Last-Event-ID"), heartbeat_seconds=15)
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingHttpResponse(sse(events), content_type="text/event-stream", headers=headers)


async def sse(events: AsyncIterator[JobEvent | EventsMissing | Heartbeat]) -> AsyncIterator[str]:
    """Each event under its id, which a browser that lost the stream gives back."""
    async for event in events:
        if isinstance(event, Heartbeat):
            yield ": nobody there is noticed by writing to him\n\n"
        else:
            yield f"id: {event.id}\ndata: {event.model_dump_json()}\n\n"


urlpatterns = [
    path("", Page.as_view()),
    path("jobs", Jobs.as_view()),
    path("jobs/<job_id>", Job.as_view()),
    path("jobs/<job_id>/events", Events.as_view()),
]
settings.configure(ROOT_URLCONF=__name__, ALLOWED_HOSTS=["*"])
app = get_asgi_application()
