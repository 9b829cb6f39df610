"""Strangers' words in HTML: whatever they are, a reader sees them, and a browser sees nothing but text."""

from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keye.producer.batch.report.markup import Excerpt, document, element, shorten, shown

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'><svg/onload=alert(1)>",
    "</style></title></textarea><b>",
    "<!-- ]]> -->",
    "&lt;script&gt; &amp; &#x3c;",
    "javascript:alert(1)",
]


class Seen(HTMLParser):
    """What a browser would make of it."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_comment(self, data: str) -> None:
        raise AssertionError(data)


def check(text: str) -> None:
    seen = Seen(document(element("p", text, element("b", text), text, title=text, aria_label=text)))
    assert seen.tags == ["p", "b"]
    assert [name for name, _ in seen.attributes] == ["title", "aria-label"]
    told = shown(text)
    assert seen.text.strip() == (told * 3).strip()
    assert "\u202e" not in seen.text + str(seen.attributes)
    assert not any(char in seen.text for char in map(chr, (*range(9), *range(14, 32), 127, 0x2066, 0xD800)))


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_gets_out_of_where_it_stands(text: str) -> None:
    check(text)


@settings(deadline=None)
@given(st.text(st.characters(exclude_characters="\r\x0c")))
def test_any_text_is_text(text: str) -> None:
    check(text)


@settings(deadline=None)
@given(st.text(), st.integers(1, 200))
def test_an_excerpt_has_no_more_bytes_than_it_may(text: str, max_bytes: int) -> None:
    excerpt = Excerpt.of(text * 20, max_bytes)
    html = document(element("p", excerpt.text)).removeprefix("<!doctype html>\n<p>").removesuffix("</p>\n")
    assert len(html.encode()) <= max_bytes
    assert excerpt.num_chars == len(text) * 20
    assert excerpt.text == shown(text * 20) or not excerpt.is_whole


def test_what_is_hidden_or_turns_the_text_round_has_a_name() -> None:
    assert shown("a\u202eb\x1b[31m\u2066\ud800\x00\r") == r"a\u202eb\x1b[31m\u2066\ud800\x00\r"


def test_other_languages_and_emoji_stand_as_they_are() -> None:
    for text in (
        "图中\u3000有一只猫。",
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
        "👩\u200d👧 ❤️",
        "a\u00a0b\n\tc",
    ):
        assert shown(text) == text


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("see https://cdn/a.jpg?X-Amz-Signature=SECRET&b=1 there", "see https://cdn/a.jpg… there"),
        ("https://me:SECRET@cdn/a.jpg#SECRET", "https://cdn/a.jpg…"),
        ("s3://media/a.jpg?versionId=1", "s3://media/a.jpg…"),
        ("it is data:image/png;base64,SECRET here", "it is data:… here"),
        ("data:;base64,SECRET", "data:…"),
        ("what is 3:4? is data: a word?", "what is 3:4? is data: a word?"),
        ("https://example.com/plain", "https://example.com/plain"),
    ],
)
def test_secrets_of_urls_and_files_within_texts_are_left_out(text: str, told: str) -> None:
    assert shown(text) == told
    assert shown(told) == told


def test_a_long_name_is_cut() -> None:
    assert shorten("a" * 1000) == "a" * 300 + "…"
