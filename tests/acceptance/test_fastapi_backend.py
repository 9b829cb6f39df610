"""examples/fastapi_backend as a person uses it: its page in Debian's Chromium, uvicorn and workers beside it."""

import signal
from pathlib import Path

import numpy as np
import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from keye.producer import Client, TextGenerated
from keye.worker.demo.local_worker import LocalWorker
from keye.worker.demo.scenes import draw_image_scene
from tests.acceptance.conftest import ECHO, PICTURE, Serve, Start
from tests.support.checkout import ROOT
from tests.support.conditions import eventually
from tests.support.pages import printed

FOLDER = ROOT / "examples" / "fastapi_backend"


class Person:
    """Somebody in front of the page at this address."""

    def __init__(self, browser: Chrome, url: str) -> None:
        self.browser = browser
        browser.get(url)

    def find(self, selector: str) -> WebElement:
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def ask(self, question: str, picture: Path) -> str:
        """Fills the form in and sends it; returns the job's id once the page has it."""
        self.find("[name=question]").clear()
        self.find("[name=question]").send_keys(question)
        self.find("[name=file]").send_keys(str(picture))
        self.find("form button").click()
        return eventually(lambda: self.browser.current_url.partition("#")[2])

    @property
    def state(self) -> str:
        return self.find("#state").text

    @property
    def answer(self) -> str:
        return self.find("#answer").text


@pytest.fixture
def person(browser: Chrome, serve: Serve) -> Person:
    _, url = serve(FOLDER)
    return Person(browser, url)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "red.png"
    path.write_bytes(PICTURE)
    return path


def test_a_picture_is_uploaded_and_its_answer_appears(person: Person, redis_url: str, tmp_path: Path) -> None:
    scene = draw_image_scene(np.random.default_rng(3))
    scene.image.save(tmp_path / "shapes.png")
    with LocalWorker(redis_url, tmp_path / "keye.log", {}):
        person.ask(scene.questions[0].text, tmp_path / "shapes.png")
        eventually(lambda: person.state == "SUCCEEDED", within_seconds=60)
        assert person.answer
        assert person.answer in scene.questions[0].reply("auto")
        assert not person.find("#cancel").is_displayed()


def test_text_is_there_before_the_job_ends_and_again_after_a_reload(
    person: Person, start: Start, picture: Path, tmp_path: Path
) -> None:
    start(*ECHO).wait_until_ready()
    person.ask(f"write {tmp_path / 'over'}", picture)
    eventually(lambda: person.answer == "write")
    assert person.state == "generate"
    person.browser.refresh()
    eventually(lambda: person.answer == "write")
    (tmp_path / "over").touch()
    eventually(lambda: person.state == "SUCCEEDED")
    assert person.answer == f"write {tmp_path / 'over'}"


def test_a_running_job_is_cancelled(person: Person, start: Start, picture: Path) -> None:
    start(*ECHO).wait_until_ready()
    person.ask("write /nowhere", picture)
    eventually(lambda: person.answer == "write")
    person.find("#cancel").click()
    eventually(lambda: person.state.startswith("CANCELLED: "))


@pytest.mark.holds("docs/stream-to-a-browser.md#why-does-my-server-not-stop", "`--timeout-graceful-shutdown 3` cuts")
@pytest.mark.holds("docs/stream-to-a-browser.md#what-does-the-backend-do", "So text comes once")
@pytest.mark.holds(
    "docs/stream-to-a-browser.md#how-do-i-stream-an-answer-to-a-browser", "By server-sent events: one GET"
)
def test_a_restarted_server_and_a_killed_worker_leave_the_text_as_it_should_be(
    browser: Chrome, serve: Serve, start: Start, client: Client, picture: Path, tmp_path: Path
) -> None:
    lease = {"KEYE_LEASE_SECONDS": "3"}
    worker = start(*ECHO, **lease)
    worker.wait_until_ready()
    server, url = serve(FOLDER)
    person = Person(browser, url)
    job = client.find(person.ask(f"write {tmp_path / 'over'}", picture))
    eventually(lambda: person.answer == "write")

    server.ask_to_end()
    assert server.exit_code() == -signal.SIGTERM
    worker.process.kill()
    serve(FOLDER, port=int(url.rpartition(":")[2]))
    start(*ECHO, **lease)
    attempts = (event.attempt for event in job.events(timeout=60) if isinstance(event, TextGenerated))
    assert max(next(attempts), next(attempts)) == 2
    (tmp_path / "over").touch()
    eventually(lambda: person.state == "SUCCEEDED", within_seconds=60)
    assert person.answer == f"write {tmp_path / 'over'}"


@pytest.mark.holds("docs/stream-to-a-browser.md#what-does-the-page-do", "let attempt = 0;")
def test_the_lines_that_docs_print_for_a_page_read_a_stream(person: Person, start: Start, client: Client) -> None:
    start(*ECHO).wait_until_ready()
    (block,) = printed("docs/stream-to-a-browser.md", "What does the page do?", language="js")
    job = client.submit(prompt="hello <b>there</b>")
    here = "const id = arguments[0], answer = document.querySelector('#answer');"
    run = person.browser.execute_script
    run(f"{here}{block} window.stream = stream;", job.id)
    eventually(lambda: run("return stream.readyState === EventSource.CLOSED"))
    assert person.answer == "hello <b>there</b>"


@pytest.mark.holds("docs/stream-to-a-browser.md#what-does-the-page-do", "`append` and `textContent` take")
def test_what_is_written_is_text_and_nothing_the_browser_would_run(person: Person, start: Start, picture: Path) -> None:
    start(*ECHO).wait_until_ready()
    person.ask("<img src=x onerror=document.title='run'>", picture)
    eventually(lambda: person.state == "SUCCEEDED")
    assert person.answer == "<img src=x onerror=document.title='run'>"
    assert person.browser.title == "Ask Keye"


def test_what_is_refused_and_a_server_that_is_gone_are_told(browser: Chrome, serve: Serve, tmp_path: Path) -> None:
    server, url = serve(FOLDER)
    (tmp_path / "notes.txt").write_text("no picture")
    person = Person(browser, url)
    person.find("[name=file]").send_keys(str(tmp_path / "notes.txt"))
    person.find("form button").click()
    eventually(lambda: "begins like no image or video" in person.state)
    server.process.kill()
    person.find("form button").click()
    eventually(lambda: person.state == "The server cannot be reached.")


def test_a_stranger_s_link_to_no_job_says_so(browser: Chrome, serve: Serve) -> None:
    _, url = serve(FOLDER)
    person = Person(browser, f"{url}/#no-such-job")
    eventually(lambda: person.state == "There is no such job.")
