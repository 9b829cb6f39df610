"""HTML that strangers' words cannot get out of: whatever they are, they stand in it as text, with nothing hidden."""

import html
import re
import unicodedata
from typing import NamedTuple
from xml.etree.ElementTree import Element, tostring

from keye.config.contract import escaped

# Joiners are part of how Persian, Hindi and emoji are written.
_HARMLESS = "\n\t\u200c\u200d"
# Queries and fragments of URLs, and who logs in by them: signed ones are secrets. And files inside of texts.
_QUERY = re.compile(r"([A-Za-z0-9+.-]{1,12}://)([^\s/?#@]*@)?([^\s?#]*)([?#]\S*)?")
_INLINE = re.compile(r"data:(?:[\w.+-]+/[\w.+-]+[^\s,]{0,99}|[^\s,]{0,99};base64),\S*", re.IGNORECASE)

_NAME_BYTES = 300


class Excerpt(NamedTuple):
    """As it may be shown, and of how many characters."""

    text: str
    num_chars: int
    is_whole: bool

    @classmethod
    def of(cls, text: str, max_bytes: int) -> "Excerpt":
        """Of its beginning, so many bytes of HTML."""
        start, num_bytes = shown(text[:max_bytes]), 0
        for index, char in enumerate(start):
            num_bytes += len(html.escape(char).encode())
            if num_bytes > max_bytes:
                return cls(start[:index], len(text), is_whole=False)
        return cls(start, len(text), is_whole=len(text) <= max_bytes)


def shorten(name: str) -> str:
    """One that may be as long as a stranger likes."""
    name, _, is_whole = Excerpt.of(name, _NAME_BYTES)
    return name if is_whole else f"{name}…"


def shown(text: str) -> str:
    """Without secrets, and with nothing hidden."""
    return _visible(_INLINE.sub("data:…", _QUERY.sub(_without_secrets, text)))


def _without_secrets(url: re.Match[str]) -> str:
    return f"{url[1]}{url[3]}{'…' if url[4] else ''}"


def _visible(text: str) -> str:
    """With names for what moves the cursor, turns the text round or is hidden."""
    return text if text.isprintable() else "".join(c if _is_text(c) else escaped(c) for c in text)


def _is_text(char: str) -> bool:
    return char.isprintable() or char in _HARMLESS or unicodedata.category(char) == "Zs"


def element(tag: str, /, *children: Element | str | None, **attributes: object) -> Element:
    """Texts lose their secrets; attributes, which hold pictures, do not.

    Names of attributes are written with `_` for `-`, and one at the end where Python has the word for itself.
    """
    made = Element(tag, {key.rstrip("_").replace("_", "-"): _visible(str(value)) for key, value in attributes.items()})
    for child in children:
        if isinstance(child, Element):
            made.append(child)
        elif child and len(made):
            made[-1].tail = (made[-1].tail or "") + shown(child)
        elif child:
            made.text = (made.text or "") + shown(child)
    return made


def document(root: Element) -> str:
    return f"<!doctype html>\n{tostring(root, 'unicode', method='html')}\n"
