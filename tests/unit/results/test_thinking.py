"""What the models write in each thinking mode: whole, cut short, and in pieces as it comes."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keye.worker.results.thinking import ThinkingSplitter, part_text


@pytest.mark.parametrize(
    ("written", "analysis", "reasoning", "answer"),
    [
        ("A red square.", None, None, "A red square."),
        ("<think>It is red.</think><answer>red</answer>", None, "It is red.", "red"),
        ("<think>\nIt is red.\n</think>\n<answer>\nred\n</answer>\n", None, "It is red.", "red"),
        ("<analysis>Easy, so /no_think.</analysis>red", "Easy, so /no_think.", None, "red"),
        (
            "<analysis>Hard, so /think.</analysis><think>1 + 1</think><answer>\\boxed{2}</answer>",
            "Hard, so /think.",
            "1 + 1",
            "\\boxed{2}",
        ),
        ("<analysis> </analysis><think></think><answer>red</answer>", None, None, "red"),
        ("<think>so</think>red", None, "so", "red"),
        ("<answer>a guess</answer> no: <answer>red</answer>", None, None, "a guess\n\nno:\n\nred"),
        ("<think>so</think><answer> <think>but</think><answer>red</answer>", None, "so\n\nbut", "red"),
        ("<answer>It is <think>so</think>.</answer>", None, None, "It is <think>so</think>."),
        ("<answer>an <analysis> tag</answer>", None, None, "an <analysis> tag"),
        ("<think>an <answer> tag, </analysis> too</think>red", None, "an <answer> tag, </analysis> too", "red"),
        ("<analysis>a <think> tag</analysis>red", "a <think> tag", None, "red"),
        ("red</answer>", None, None, "red"),
        ("<thinking>red</thinking>", None, None, "<thinking>red</thinking>"),
        ("x < 3 and y > 4", None, None, "x < 3 and y > 4"),
        ("", None, None, ""),
    ],
)
def test_analysis_reasoning_and_answer_are_told_apart(
    written: str, analysis: str | None, reasoning: str | None, answer: str
) -> None:
    assert part_text(written) == (analysis, reasoning, answer)


@pytest.mark.parametrize(
    ("written", "analysis", "reasoning", "answer"),
    [
        ("<analysis>This looks ha", "This looks ha", None, ""),
        ("<analysis>Hard.</analysis><think>First", "Hard.", "First", ""),
        ("<think>First, the col", None, "First, the col", ""),
        ("<think>so</think><answer>a red squ", None, "so", "a red squ"),
        ("<think>so</think>", None, "so", ""),
    ],
)
def test_text_that_was_cut_short_is_never_taken_for_the_answer(
    written: str, analysis: str | None, reasoning: str | None, answer: str
) -> None:
    assert part_text(written) == (analysis, reasoning, answer)


WRITTEN = st.lists(
    st.sampled_from([*(f"<{slash}{name}>" for name in ("analysis", "think", "answer") for slash in ("", "/"))])
    | st.text(alphabet="</>an \n猫", max_size=6)
).map("".join)


@given(WRITTEN, st.data())
def test_text_in_pieces_of_any_size_is_parted_as_the_whole(written: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(written)), max_size=20)))
    splitter = ThinkingSplitter()
    said = {"analysis": "", "reasoning": "", "answer": ""}
    for start, end in pairwise([0, *cuts, len(written)]):
        for channel, text in splitter.push(written[start:end]):
            said[channel] += text
    for channel, text in splitter.flush():
        said[channel] += text
    assert (said["analysis"] or None, said["reasoning"] or None, said["answer"]) == part_text(written)


def test_text_is_passed_on_before_its_block_ends() -> None:
    splitter = ThinkingSplitter()
    assert splitter.push("<think>It is r") == [("reasoning", "It is r")]
    assert splitter.push("ed. </th") == [("reasoning", "ed.")]
    assert splitter.push("ink>\n1 <") == [("answer", "1")]
    assert splitter.push(" 2") == [("answer", " < 2")]
