"""Parts what the model wrote into its reasoning and its answer. Pure; no sampling, no events."""

from typing import NamedTuple


class PartedText(NamedTuple):
    reasoning: str | None
    answer: str


def part_text(raw_text: str) -> PartedText:
    """Reasoning is what stands in `<analysis>` and `<think>`; the answer is the last `<answer>`, or else all the rest.

    The order is the one the models write: analysis, think, answer, each of them optional. A block that was cut short
    reaches to the end. `\\boxed{}` is the caller's to read and stays.
    """
    reasoning = []
    rest = raw_text
    for opening, closing in (("<analysis>", "</analysis>"), ("<think>", "</think>")):
        block, closed, after = rest.partition(closing)
        if closed:
            # A prompt may have written the opening tag: all before the closing one is the block.
            reasoning.append(block.replace(opening, "", 1))
            rest = after
        elif opening in rest:
            rest, _, block = rest.partition(opening)
            reasoning.append(block)
    _, opened, answer = rest.rpartition("<answer>")
    if opened:
        rest = answer.partition("</answer>")[0]
    return PartedText("\n\n".join(filter(None, map(str.strip, reasoning))) or None, rest.strip())
