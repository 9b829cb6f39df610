"""Three-row positions of one sequence, and the errors when placeholders and grids disagree."""

from typing import Any

import pytest
import torch

from keye.worker.model.configuration_keye import KeyeConfig, KeyeVL1_5Config
from keye.worker.model.positions import PlaceholderMismatch, position_ids

TEXT, IMAGE, VIDEO = 1, 7, 8


def positions_of(
    tokens: list[int], variant: type[KeyeConfig] = KeyeConfig, **grids: Any
) -> tuple[list[list[int]], int]:
    config = variant(image_token_id=IMAGE, video_token_id=VIDEO)
    positions, delta = position_ids(torch.tensor(tokens), config, **grids)
    return positions.tolist(), delta


@pytest.mark.holds(
    "docs/model.md#positions",
    "Three rows: temporal, height, width.",
    "Text takes `cur` in all three and counts on.",
)
def test_text_counts_up_in_all_rows() -> None:
    assert positions_of([TEXT] * 3) == ([[0, 1, 2]] * 3, 0)


@pytest.mark.holds("docs/model.md#positions", "then cur = 1 + the largest used", "`rope_delta` = 1 + largest")
def test_text_behind_an_image_goes_on_from_its_longer_side() -> None:
    positions, delta = positions_of([TEXT] + [IMAGE] * 6 + [TEXT], image_grids=[(1, 4, 6)])
    assert positions == [
        [0, 1, 1, 1, 1, 1, 1, 4],
        [0, 1, 1, 1, 2, 2, 2, 4],
        [0, 1, 2, 3, 1, 2, 3, 4],
    ]
    assert delta == 5 - 8


@pytest.mark.holds("docs/model.md#positions", "at 2 fps 0,1,2…, at 3 fps 0,0,1,2,2,3")
@pytest.mark.holds("docs/model.md#how-the-variants-differ", "clock of a video | steps by its frame rate")
@pytest.mark.parametrize(
    ("fps", "clock"), [(2.0, [0, 1, 2, 3, 4, 5]), (1.0, [0, 2, 4, 6, 8, 10]), (3.0, [0, 0, 1, 2, 2, 3])]
)
def test_clock_of_a_whole_video_follows_its_frame_rate_and_truncates(fps: float, clock: list[int]) -> None:
    positions, _ = positions_of([VIDEO] * 6, video_grids=[(6, 2, 2)], seconds_per_frame=[1 / fps])
    assert positions[0] == clock
    assert positions[1] == positions[2] == [0] * 6


@pytest.mark.holds("docs/model.md#how-the-variants-differ", "each frame is a block of its own")
def test_frame_that_is_an_item_of_its_own_moves_all_rows_on() -> None:
    positions, _ = positions_of([TEXT, VIDEO, TEXT, VIDEO], KeyeVL1_5Config, video_grids=[(2, 2, 2)])
    assert positions == [[0, 1, 2, 3]] * 3


def test_image_right_beside_a_video_keeps_its_own_block() -> None:
    positions, _ = positions_of([IMAGE, VIDEO, VIDEO], image_grids=[(1, 2, 2)], video_grids=[(1, 2, 4)])
    assert positions == [[0, 1, 1], [0, 1, 1], [0, 1, 2]]


@pytest.mark.parametrize(
    ("tokens", "grids", "words"),
    [
        ([IMAGE], {}, "more runs of image placeholders"),
        ([TEXT], {"video_grids": [(1, 2, 2)]}, "more video grids"),
        ([IMAGE] * 3, {"image_grids": [(1, 4, 4)]}, "a run of 3 image placeholders meets an item of 1x2x2"),
    ],
)
def test_disagreement_of_placeholders_and_grids_is_named(tokens: list[int], grids: Any, words: str) -> None:
    with pytest.raises(PlaceholderMismatch, match=words):
        positions_of(tokens, **grids)
