"""What a regular expression comes to when it is written out: how much, and a text that it may match. Pure."""

import re
from dataclasses import dataclass, field

# A class may hold others, as in [a-z&&[^aeiou]] and [[:alpha:]]: here so deep at most.
_CLASS = r"\[\^?\]?(?:\\.|[^\[\]\\])*\]"
_CLASS = rf"\[\^?\]?(?:\\.|[^\[\]\\]|{_CLASS})*\]"
_PIECE = re.compile(
    r"\(\?[a-zA-Z-]+\)|\(\?(?:P?<[^>]*>|[a-zA-Z-]*:)?|\\[pPxuU]\{[^}]*\}|\\.|\{\s*\d*\s*,?\s*\d*\s*\}|" + _CLASS + "|.",
    re.DOTALL,
)
# In verbose text white space and comments may stand between what is repeated and how often.
_VERBOSE = re.compile(r"\(\?[a-zA-Z-]*x")
_CLASSES = {"d": "0", "w": "a", "s": " ", "n": "\n", "t": "\t", "r": "\r", "S": "a", "D": "a", "W": " "}


@dataclass(slots=True)
class _Group:
    """One that is open: the size of it all, the samples of this alternative's pieces, and of those before."""

    size: int = 0
    samples: list[str] = field(default_factory=list)
    alternatives: list[str] = field(default_factory=list)

    @property
    def sample(self) -> str:
        return min([*self.alternatives, "".join(self.samples)], key=len)


def written_out(regex: str) -> tuple[int, str]:
    """How many characters it has when each repetition is written as often as it may be, with more for what may be
    left out: each is compared with all that may follow it. And a short text that it matches, by and large: of what is
    negated or looked up in Unicode's tables it knows nothing.

    Raises `ValueError` where it cannot tell.
    """
    groups = [_Group()]
    last = 0
    for piece in _PIECE.findall(regex):
        group = groups[-1]
        if piece in ("[", "\\"):
            raise ValueError(f"is a regular expression with a {piece} that ends nowhere, or classes nested too deeply")
        if piece[0] == "(":
            if _VERBOSE.match(piece):
                raise ValueError("is a verbose regular expression, (?x): write it without white space and comments")
            if not piece.endswith(")"):
                groups.append(_Group())
            continue
        if piece == "|":
            group.alternatives.append("".join(group.samples))
            group.samples = []
        elif piece in ("*", "?", "+") or (piece[0] == "{" and len(piece) > 2):
            numbers = [min(int(number), 10**6) for number in re.findall(r"\d+", piece)] or [0, 1]
            least = numbers[0] if piece[0] == "{" else int(piece == "+")
            most, more = max(*numbers, 1, 1), _OPTIONAL if least == 0 else 0
            group.size += last * (most - 1) + more
            last = last * most + more
            if group.samples:
                group.samples[-1] = (group.samples[-1] * least)[:_MOST_CHARS]
            continue
        elif piece == ")" and len(groups) > 1:
            ended = groups.pop()
            last = ended.size + (_OPTIONAL if ended.alternatives and not ended.sample else 0)
            groups[-1].size += last
            groups[-1].samples.append(ended.sample)
        elif piece not in ("^", "$"):
            last = 1
            group.size += 1
            group.samples.append(_sample(piece))
    return sum(group.size for group in groups), groups[0].sample


_OPTIONAL = 60
# Nobody has use for a longer sample.
_MOST_CHARS = 2000


def _sample(piece: str) -> str:
    """Of one character or class of them."""
    if piece == "." or piece[:2] in ("[^", r"\p", r"\P"):
        return "a"
    inner = (piece[0] == "[" and piece[1:-1]) or piece
    return _CLASSES.get(inner[1:2], inner[1:2]) if inner[0] == "\\" else inner[0]
