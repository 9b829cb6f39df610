"""Parts what the model writes into analysis, reasoning and answer, as it comes. Pure; no sampling, no events."""

import re
from typing import Literal, NamedTuple, get_args

from keye.config.event import Channel

_TAG = re.compile("(</?(?:analysis|think|answer)>)")
_LONGEST_TAG = len("</analysis>")
_OPENED_BY: dict[str | None, Channel] = {"<analysis>": "analysis", "<think>": "reasoning", "<answer>": "answer"}
_OPENED_BY[None] = "answer"
_ENDED_BY = {"<analysis>": "</analysis>", "<think>": "</think>", "<answer>": "</answer>"}

_CLOSING = _ENDED_BY["<answer>"]
AnswerForm = Literal["free", "bare", "tagged"]


class Piece(NamedTuple):
    channel: Channel
    text: str


class PartedText(NamedTuple):
    analysis: str | None
    reasoning: str | None
    answer: str


class ThinkingSplitter:
    """Takes text in pieces; what it gives back, joined by channel, does not depend on where the text was cut.

    `<analysis>` holds the analysis, `<think>` the reasoning; `<answer>`, and all that stands in no block, is answer. A
    block reaches to its own closing tag, or to the end where it was cut short; an answer without a word ends where the
    model thinks instead. Blocks lose the white space around them, and those of a channel are joined by an empty line.
    `\\boxed{}` is the caller's to read and stays.

    Of an answer that fits a schema, `bare` where it stands alone and `tagged` where it begins at the first `<answer>`,
    nothing within is a tag, and all white space stays.
    """

    def __init__(self, form: AnswerForm = "free") -> None:
        self._form = form
        # Once it is, what may be the tag that closes it waits in `_half_tag`.
        self._is_verbatim = form == "bare"
        # The tag that opened it.
        self._block: str | None = None
        self._block_is_blank = True
        self._begun: set[Channel] = set()
        self._pieces: list[Piece] = []
        # What may become a tag, and white space that may be the block's last.
        self._half_tag = ""
        self._space: list[str] = []

    def push(self, text: str) -> list[Piece]:
        """The pieces that are certain now."""
        if self._is_verbatim:
            self._copy(text)
            return self._take()
        *complete, rest = _TAG.split(self._half_tag + text)
        for index, part in enumerate(complete):
            self._read(part)
            if self._form == "tagged" and self._block == "<answer>":
                self._half_tag, self._is_verbatim = "", True
                self._copy("".join(complete[index + 1 :]) + rest)
                return self._take()
        cut = rest.rfind("<", -_LONGEST_TAG)
        if cut < 0 or not _may_become_tag(rest[cut:]):
            cut = len(rest)
        self._write(rest[:cut])
        self._half_tag = rest[cut:]
        return self._take()

    def flush(self) -> list[Piece]:
        """What was held back; nothing follows."""
        if self._is_verbatim:
            self._copy("", is_last=True)
        else:
            self._write(self._half_tag)
        self._half_tag = ""
        return self._take()

    def _copy(self, text: str, is_last: bool = False) -> None:
        text = self._half_tag + text
        most = 0 if self._form == "bare" else len(_CLOSING)
        held = max((n for n in range(most + 1) if text.endswith(_CLOSING[:n])), default=0)
        if is_last and held < len(_CLOSING):
            held = 0
        if shown := text[: len(text) - held]:
            self._pieces.append(Piece("answer", shown))
        self._half_tag = text[len(text) - held :]

    def _read(self, part: str) -> None:
        """A whole tag, or text without one. A tag inside a block that does not end it is text, and one that ends no
        block stands for nothing."""
        thinks_instead = self._block == "<answer>" and self._block_is_blank and part == "<think>"
        is_border = thinks_instead or part == _ENDED_BY[self._block] if self._block else _TAG.fullmatch(part)
        if not is_border:
            self._write(part)
            return
        self._block = part if part in _ENDED_BY else None
        self._block_is_blank = True
        self._space = []

    def _write(self, text: str) -> None:
        if self._block_is_blank:
            text = text.lstrip()
        shown = text.rstrip()
        if not shown:
            # Not joined before something follows: a model may write white space without an end.
            self._space.append(text)
            return
        shown = "".join(self._space) + shown
        self._space = [text[len(text.rstrip()) :]]
        channel = _OPENED_BY[self._block]
        if self._block_is_blank and channel in self._begun:
            shown = "\n\n" + shown
        self._block_is_blank = False
        self._begun.add(channel)
        self._pieces.append(Piece(channel, shown))

    def _take(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return pieces


def answer_form(schema: object, thinking: str) -> AnswerForm:
    """How an answer is written that has to fit the schema, if there is one: see `Constraint`."""
    return "free" if schema is None else "bare" if thinking == "no_think" else "tagged"


def part_text(raw_text: str, form: AnswerForm = "free") -> PartedText:
    """What the splitter gives for the whole; `analysis` and `reasoning` are None where there is none."""
    splitter = ThinkingSplitter(form)
    pieces = splitter.push(raw_text) + splitter.flush()
    texts = {channel: "".join(text for c, text in pieces if c == channel) for channel in get_args(Channel)}
    return PartedText(texts["analysis"] or None, texts["reasoning"] or None, texts["answer"])


def _may_become_tag(start: str) -> bool:
    return any(tag.startswith(start) for tags in _ENDED_BY.items() for tag in tags)
