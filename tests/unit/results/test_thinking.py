"""What the models write in each thinking mode: whole, cut short, and in pieces as it comes."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keye.worker.results.thinking import ThinkingSplitter, part_text


@pytest.mark.parametrize(
    ("written", "reasoning", "answer"),
    [
        ("A red square.", None, "A red square."),
        ("<think>It is red.</think><answer>red</answer>", "It is red.", "red"),
        ("<think>\nIt is red.\n</think>\n<answer>\nred\n</answer>\n", "It is red.", "red"),
        ("<analysis>Easy, so /no_think.</analysis>red", "Easy, so /no_think.", "red"),
        (
            "<analysis>Hard, so /think.</analysis><think>1 + 1</think><answer>\\boxed{2}</answer>",
            "Hard, so /think.\n\n1 + 1",
            "\\boxed{2}",
        ),
        ("<think></think><answer>red</answer>", None, "red"),
        ("<think>so</think>red", "so", "red"),
        ("<answer>a guess</answer> no: <answer>red</answer>", None, "a guess\n\nno:\n\nred"),
        ("<think>an <answer> tag, </analysis> too</think>red", "an <answer> tag, </analysis> too", "red"),
        ("red</answer>", None, "red"),
        ("<thinking>red</thinking>", None, "<thinking>red</thinking>"),
        ("x < 3 and y > 4", None, "x < 3 and y > 4"),
        ("", None, ""),
    ],
)
def test_reasoning_and_answer_are_told_apart(written: str, reasoning: str | None, answer: str) -> None:
    assert part_text(written) == (reasoning, answer)


@pytest.mark.parametrize(
    ("written", "reasoning", "answer"),
    [
        ("<analysis>This looks ha", "This looks ha", ""),
        ("<analysis>Hard.</analysis><think>First", "Hard.\n\nFirst", ""),
        ("<think>First, the col", "First, the col", ""),
        ("<think>so</think><answer>a red squ", "so", "a red squ"),
        ("<think>so</think>", "so", ""),
    ],
)
def test_text_that_was_cut_short_is_never_taken_for_the_answer(
    written: str, reasoning: str | None, answer: str
) -> None:
    assert part_text(written) == (reasoning, answer)


WRITTEN = st.lists(
    st.sampled_from([*(f"<{slash}{name}>" for name in ("analysis", "think", "answer") for slash in ("", "/"))])
    | st.text(alphabet="</>an \n猫", max_size=6)
).map("".join)


@given(WRITTEN, st.data())
def test_text_in_pieces_of_any_size_is_parted_as_the_whole(written: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(written)), max_size=20)))
    splitter = ThinkingSplitter()
    said = {"reasoning": "", "answer": ""}
    for start, end in pairwise([0, *cuts, len(written)]):
        for channel, text in splitter.push(written[start:end]):
            said[channel] += text
    for channel, text in splitter.flush():
        said[channel] += text
    assert (said["reasoning"] or None, said["answer"]) == part_text(written)


def test_text_is_passed_on_before_its_block_ends() -> None:
    splitter = ThinkingSplitter()
    assert splitter.push("<think>It is r") == [("reasoning", "It is r")]
    assert splitter.push("ed. </th") == [("reasoning", "ed.")]
    assert splitter.push("ink>\n1 <") == [("answer", "1")]
    assert splitter.push(" 2") == [("answer", " < 2")]
