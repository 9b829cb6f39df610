"""The page about a batch as people look at it, in Debian's Chromium."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from selenium.common.exceptions import NoAlertPresentException
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from keye import ErrorCode
from keye.config.job import AnalysisJob
from keye.testing import MemoryClient
from keye.worker.demo.scenes import draw_image_scene
from tests.support.zoo import encode_clip, steady_times

HOSTILE = "\"'><script>alert(1)</script><img src=https://127.0.0.1:9/x onerror=alert(1)><style>*{display:none}</style>"
STYLED = '"><div style="position:fixed;inset:0;background:url(https://127.0.0.1:9/y)">'
LONG = "x" * 900 + " " + "A kitchen with orange tiles. " * 90 + "."


def reply(job: AnalysisJob) -> str | ErrorCode:
    match job.prompt:
        case "fail":
            return ErrorCode.MEDIA_CORRUPT
        case "long":
            return LONG
        case prompt:
            return f"{HOSTILE} {STYLED} {prompt}"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp_path = tmp_path_factory.mktemp("batch")
    scene = draw_image_scene(np.random.default_rng(3))
    scene.image.save(tmp_path / "scene.png")
    scene.image.convert("CMYK").save(tmp_path / 'a "quoted" & <b>odd<b> name.jpg')
    encode_clip(tmp_path / "clip.mp4", steady_times(20))
    (tmp_path / "cut.jpg").write_bytes(b"\xff\xd8\xff")
    names = ("scene.png", 'a "quoted" & <b>odd<b> name.jpg', "clip.mp4", "cut.jpg")
    media = [{"type": "image", "uri": str(tmp_path / name)} for name in names]
    web = {"type": "image", "uri": "https://127.0.0.1:9/a.jpg?sig=SECRET"}
    lines: list[dict[str, Any]] = [
        {"custom_id": HOSTILE, "prompt": "all", "media": media},
        {"custom_id": "long", "prompt": "long", "media": media[:1]},
        {"custom_id": "b" * 1024, "prompt": f"{STYLED} " + "w" * 3000, "media": [web]},
        *({"custom_id": f"spoilt {index}", "prompt": "fail"} for index in range(5)),
    ]
    source = tmp_path / "questions.jsonl"
    source.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    with MemoryClient(reply) as client:
        ended = client.submit_batch(source, tmp_path / "out.jsonl", report=tmp_path / "r.html").wait(60)
    assert (ended.answered, ended.failed, ended.trouble) == (3, 5, "")
    return tmp_path / "r.html"


def asked_for(browser: Chrome) -> list[str]:
    """All that it has asked the network or the disk for since the last time, but what is inside the page."""
    events = (json.loads(entry["message"])["message"] for entry in browser.get_log("performance"))
    urls = [each["params"]["request"]["url"] for each in events if each["method"] == "Network.requestWillBeSent"]
    return [url for url in urls if not url.startswith("data:")]


def card(browser: Chrome, custom_id: str) -> WebElement:
    cards = browser.find_elements(By.CSS_SELECTOR, "article")
    return next(card for card in cards if card.find_element(By.TAG_NAME, "h3").text.startswith(custom_id))


@pytest.mark.holds(
    "docs/batches.md#how-do-i-look-at-it",
    "asks no network and runs no script",
)
def test_a_report_is_looked_at_without_a_network(browser: Chrome, page: Path) -> None:
    asked_for(browser), browser.get_log("browser")
    browser.get(page.as_uri())
    assert asked_for(browser) == [page.as_uri()]
    assert browser.get_log("browser") == []
    with pytest.raises(NoAlertPresentException):
        browser.switch_to.alert.accept()
    shown = browser.find_element(By.TAG_NAME, "body").text
    assert not [text for text in (HOSTILE, STYLED, "MEDIA_CORRUPT", "spoilt 4", "62.5 %") if text not in shown]
    assert "SECRET" not in browser.page_source


def test_answers_stand_beside_what_they_are_about(browser: Chrome, page: Path) -> None:
    browser.get(page.as_uri())
    pictures = card(browser, HOSTILE).find_elements(By.TAG_NAME, "img")
    assert [picture.get_property("naturalWidth") for picture in pictures] == [112, 112, 160]
    assert all(picture.is_displayed() for picture in pictures)
    assert (pictures[1].get_attribute("alt") or "").endswith('a "quoted" & <b>odd<b> name.jpg, medium 2 of 4')
    assert "and 1 more" in card(browser, HOSTILE).text
    assert "what is on the web is not fetched" in card(browser, "bbb").text


def test_both_charts_show_bars_and_say_so_in_words(browser: Chrome, page: Path) -> None:
    browser.get(page.as_uri())
    when, how_long = browser.find_elements(By.CSS_SELECTOR, "figure")
    for figure, told in ((when, "lines ended within"), (how_long, "Half of the answers came within")):
        chart = figure.find_element(By.CSS_SELECTOR, "svg[role=img]")
        assert chart.is_displayed()
        assert told in figure.find_element(By.TAG_NAME, "figcaption").text
        assert told in (chart.get_attribute("aria-label") or "")
    bars = [when.find_element(By.CSS_SELECTOR, f"rect.{kind}") for kind in ("answered", "failed")]
    assert all(bar.size["height"] > 10 for bar in bars)
    assert len({bar.value_of_css_property("fill") for bar in bars}) == 2
    when.find_element(By.TAG_NAME, "summary").click()
    rows = [row.text.split()[-2:] for row in when.find_elements(By.CSS_SELECTOR, "tbody tr")]
    assert [sum(map(int, column)) for column in zip(*rows, strict=True)] == [3, 5]


def test_a_long_answer_is_folded_and_unfolds(browser: Chrome, page: Path) -> None:
    browser.get(page.as_uri())
    folded = card(browser, "long").find_element(By.CSS_SELECTOR, "details.long")
    whole = folded.find_element(By.CSS_SELECTOR, ".prose")
    assert not whole.is_displayed()
    folded.find_element(By.CSS_SELECTOR, ".more").click()
    assert whole.is_displayed()
    assert whole.text.endswith(f" … and on to {len(LONG):,} characters.")


@pytest.mark.parametrize("width", [360, 800])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_a_screen_and_all_can_be_read(
    browser: Chrome, page: Path, width: int, scheme: str
) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    try:
        browser.get(page.as_uri())
        run = browser.execute_script
        assert run("return document.documentElement.scrollWidth") == width
        assert run("return [...document.querySelectorAll('details')].every(each => each.open = true)")
        assert run("return document.documentElement.scrollWidth") == width
        ground = run("return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
        ink = run("return getComputedStyle(document.body).color.match(/\\d+/g).map(Number)")
        assert (sum(ground) > sum(ink)) is (scheme == "light")
        assert abs(sum(ground) - sum(ink)) > 500
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
