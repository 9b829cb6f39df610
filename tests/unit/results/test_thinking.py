"""What the models write in each thinking mode, whole and cut short."""

import pytest

from worker.results.thinking import part_text


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
        ("<answer>a guess</answer> no: <answer>red</answer>", None, "red"),
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


def test_block_that_the_prompt_opened_ends_at_its_closing_tag() -> None:
    assert part_text("It is red.</think><answer>red</answer>") == ("It is red.", "red")
