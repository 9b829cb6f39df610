"""docs/producers.md: its tables and lists beside the code; other tests hold what happens."""

import inspect
import re

import numpy as np
import pytest

import keye
from keye.config.faults import Refusal
from keye.config.job import VideoPart
from keye.producer import AsyncClient, AsyncJob, Client, Job
from keye.worker.media.frames.video_plan import CONTENT_FPS, find_stretch, num_asked, rate_asked
from tests.support.checkout import ROOT

PAGE = (ROOT / "docs/producers.md").read_text()


@pytest.mark.holds("docs/producers.md#what-can-be-raised", "The first five are the `Refusal`s.")
def test_the_first_five_that_can_be_raised_are_the_refusals() -> None:
    table = PAGE.split("| raised | when |")[1].split("\n\n")[0]
    named = re.findall(r"`([A-Z]\w+)`", " ".join(row.split("|")[1] for row in table.splitlines()[2:]))
    errors = [getattr(keye, name) for name in named if hasattr(keye, name)]
    assert [issubclass(error, Refusal) for error in errors] == [True] * 5 + [False] * (len(errors) - 5)
    assert len(errors) > 12


@pytest.mark.holds(
    "docs/producers.md#from-asyncio",
    "`AsyncClient` has the same verbs, arguments and errors",
    "What is for operators (dead letters, quarantine, `replay`",
)
def test_the_clients_differ_in_what_is_for_operators() -> None:
    def verbs(kind: type) -> set[str]:
        return {name for name in vars(kind) if not name.startswith("_")}

    # No page speaks of them.
    inner = {"job", "send", "seal_all", "seal_about", "let_go", "kept_seconds", "follow_ends", "follow_feed"}
    assert verbs(Client) - verbs(AsyncClient) - inner == {
        *("dead_letters", "quarantine", "replay", "status", "overview", "verify"),
        *("list_jobs", "job_status", "cancel_queued"),
    }
    assert verbs(AsyncClient) <= verbs(Client)
    public = {name for name in verbs(Job) if not name.startswith("follow")}
    assert public - verbs(AsyncJob) <= {"id"}
    for name in ("submit", "submit_many", "results", "map", "watch", "find"):
        mine, others = (list(inspect.signature(getattr(kind, name)).parameters) for kind in (Client, AsyncClient))
        assert mine == others, name


@pytest.mark.holds("docs/producers.md#how-much-of-a-video-is-read", "field | what it does")
@pytest.mark.holds(
    "docs/producers.md#how-much-of-a-video-is-read",
    "`fps` | so many frames a second",
    "the rate by what is shown",
    "one stretch of the clip",
)
def test_rates_of_the_table_are_those_in_force() -> None:
    (row,) = re.findall(r"^\| `content` \|(.*)\|$", PAGE, re.MULTILINE)
    told = {word: (float(low), float(high)) for word, low, high in re.findall(r"`(\w+)` (\d+) to (\d+)", row)}
    assert told == {content.value: rates for content, rates in CONTENT_FPS.items()}
    for content, (low, high) in told.items():
        part = VideoPart(uri="/clip.mp4", content=content)
        assert (rate_asked(part, 600), rate_asked(part, 0.5)) == (low, high)
    assert num_asked(VideoPart(uri="/clip.mp4", fps=3), 10) == 30
    stretch = find_stretch(np.arange(100) / 10, 10, VideoPart(uri="/clip.mp4", start_seconds=2, end_seconds=5))
    assert (stretch.start, stretch.end, stretch.first, stretch.last) == (2, 5, 20, 49)
