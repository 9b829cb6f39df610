"""The FastAPI and the Django backend of examples/, asked by a program; a browser asks in test_fastapi_backend.py."""

import json
import signal
import socket
from pathlib import Path
from typing import Any

import boto3
import pytest
from httpx2 import Client as HttpClient
from redis import Redis

from keye.config import keys
from keye.producer import Client, JobState
from tests.acceptance.conftest import ECHO, PICTURE, Serve, Start
from tests.support.checkout import ROOT
from tests.support.conditions import eventually


@pytest.fixture(params=["fastapi", "django"])
def folder(request: pytest.FixtureRequest) -> Path:
    return ROOT / "examples" / f"{request.param}_backend"


def ask(http: HttpClient, question: str) -> str:
    """The job's id."""
    files = {"file": ("red.png", PICTURE, "image/png")}
    reply = http.post("/jobs", data={"question": question}, files=files)
    assert reply.status_code == 202, reply.text
    return reply.json()["id"]


def text_of(events: list[dict[str, Any]]) -> str:
    return "".join(event["text"] for event in events if event["type"] == "text")


def test_a_stream_that_is_taken_up_goes_on_where_it_was(
    folder: Path, serve: Serve, start: Start, tmp_path: Path
) -> None:
    start(*ECHO).wait_until_ready()
    _, url = serve(folder)
    with HttpClient(base_url=url, timeout=60) as http:
        job_id = ask(http, f"write {tmp_path / 'over'}")
        with http.sse(f"/jobs/{job_id}/events") as stream:
            seen = []
            for each in stream:
                seen.append((each.id, each.json()))
                if seen[-1][1]["type"] == "text":
                    break
        assert text_of([event for _, event in seen]) == "write"
        (tmp_path / "over").touch()
        with http.sse(f"/jobs/{job_id}/events", headers={"Last-Event-ID": seen[-1][0]}) as stream:
            rest = [each.json() for each in stream]
        assert "write" + text_of(rest) == f"write {tmp_path / 'over'}"
        assert rest[-1]["type"] == "ended"
        assert rest[-1]["state"] == "SUCCEEDED"
        told = http.get(f"/jobs/{job_id}").json()
        assert told["progress"]["state"] == "SUCCEEDED"
        assert told["outcome"]["answer"] == f"write {tmp_path / 'over'}"


@pytest.mark.holds(
    "docs/stream-to-a-browser.md#how-do-i-stream-an-answer-to-a-browser", "Two programs to copy do all that stands here"
)
def test_a_running_job_is_cancelled(folder: Path, serve: Serve, start: Start, client: Client) -> None:
    start(*ECHO).wait_until_ready()
    _, url = serve(folder)
    with HttpClient(base_url=url, timeout=60) as http:
        job_id = ask(http, "write /nowhere")
        eventually(lambda: client.find(job_id).state is JobState.RUNNING)
        assert http.get(f"/jobs/{job_id}").json()["outcome"] is None
        assert http.delete(f"/jobs/{job_id}").json() == {"cancellation": "requested"}
        with http.sse(f"/jobs/{job_id}/events") as stream:
            assert [each.json() for each in stream][-1]["state"] == "CANCELLED"
        assert http.get(f"/jobs/{job_id}").json()["outcome"]["code"] == "CANCELLED"


@pytest.mark.holds(
    "docs/stream-to-a-browser.md#what-does-the-backend-do", "The bucket is yours, not the stranger's word"
)
def test_what_cannot_be_asked_is_told_by_its_status(folder: Path, serve: Serve, redis: Redis) -> None:
    _, url = serve(folder, KEYE_MAX_QUEUE_DEPTH="1")
    with HttpClient(base_url=url, timeout=60) as http:
        assert "There is no job" in http.get("/jobs/7").json()["detail"]
        for refused in (http.get("/jobs/7"), http.get("/jobs/7/events"), http.delete("/jobs/7")):
            assert refused.status_code == 404
        fields = {"question": "What is it?"}
        for wrong in ({}, {"uri": "/etc/passwd.png"}, {"uri": "http://127.0.0.1/x.png"}, {"uri": "s3://what/is-it"}):
            assert http.post("/jobs", data=fields | wrong).status_code == 422, wrong
        assert http.post("/jobs", data={"uri": "s3://photos/cat.jpg"}).status_code == 422
        assert http.post("/jobs", data=fields, files={"file": ("x.png", bytes(64 * 2**20 + 1))}).status_code == 413
        waiting = ask(http, "Who waits?")
        assert http.get(f"/jobs/{waiting}/events", headers={"Last-Event-ID": "the last"}).status_code == 422
        full = http.post("/jobs", data=fields | {"uri": "s3://photos/cat.jpg"})
        assert full.status_code == 503
        assert int(full.headers["Retry-After"]) > 0


@pytest.mark.usefixtures("s3_credentials")
def test_a_large_file_goes_by_way_of_a_store(folder: Path, serve: Serve, redis: Redis, s3_endpoint: str) -> None:
    boto3.session.Session().client("s3", endpoint_url=s3_endpoint).create_bucket(Bucket="media")
    prefix = "s3://media/uploads"
    _, url = serve(folder, KEYE_UPLOAD_PREFIX=prefix, KEYE_S3_ENDPOINT_URL=s3_endpoint)
    large = PICTURE + bytes(5 * 2**20)
    with HttpClient(base_url=url, timeout=60) as http:
        asked = http.post("/jobs", data={"question": "What is it?"}, files={"file": ("red.png", large)})
    assert asked.status_code == 202, asked.text
    sealed = json.loads(redis.hget(keys.record(asked.json()["id"]), "sealed"))
    assert sealed["job"]["media"][0]["uri"].startswith(f"{prefix}/")


def test_a_queue_that_is_away_is_told_but_not_where_it_is(folder: Path, serve: Serve) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        _, url = serve(folder, KEYE_REDIS_URL=f"redis://127.0.0.1:{port}/0")
        with HttpClient(base_url=url, timeout=60) as http:
            away = http.post("/jobs", data={"question": "?", "uri": "s3://photos/cat.jpg"})
    assert away.status_code == 503
    assert str(port) not in away.text


@pytest.mark.holds(
    "docs/stream-to-a-browser.md#why-does-my-server-not-stop", "uvicorn ends when all responses have ended"
)
@pytest.mark.holds("docs/stream-to-a-browser.md#what-does-the-backend-do", "Then the generator is ended")
def test_who_goes_away_is_followed_no_longer_and_a_server_ends_beside_open_streams(
    folder: Path, serve: Serve, client: Client, redis: Redis
) -> None:
    server, url = serve(folder)
    job = client.submit(prompt="Who answers?")
    with HttpClient(base_url=url, timeout=60) as http:
        with http.stream("GET", f"/jobs/{job.id}/events") as stream:
            assert stream.status_code == 200
            eventually(lambda: num_readers(redis))
        eventually(lambda: not num_readers(redis))
        with http.stream("GET", f"/jobs/{job.id}/events"):
            eventually(lambda: num_readers(redis))
            server.ask_to_end()
            assert server.exit_code() == -signal.SIGTERM
    eventually(lambda: not num_readers(redis))


def num_readers(redis: Redis) -> int:
    """Connections that wait for events."""
    return sum(each["cmd"] == "xread" and "b" in each["flags"] for each in redis.client_list())
