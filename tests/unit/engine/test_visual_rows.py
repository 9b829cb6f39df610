"""Media that go through the tower as the chunks of a prompt reach them."""

import pytest
import torch

from keye.worker.engine.visual_rows import VisualRows
from keye.worker.model.positions import PlaceholderMismatch

GRIDS = torch.tensor([[1, 2, 4], [1, 2, 2], [2, 2, 2]])  # 2, 1 and 2 rows of four patches
COLUMNS = torch.tensor([3, 4, 7, 9, 12])  # the last item is a video whose frames have text between them
PATCHES = torch.arange(20.0).view(20, 1, 1, 1)


@pytest.fixture
def media() -> VisualRows:
    return VisualRows(COLUMNS, PATCHES, GRIDS, 4, [b"a", b"b", b"c"])


@pytest.mark.parametrize(
    ("start", "stop", "items"),
    [
        (0, 3, []),
        (0, 4, [0]),
        (4, 5, [0]),
        (5, 7, []),
        (5, 8, [1]),
        (4, 10, [0, 1, 2]),
        (10, 13, [2]),
        (13, 40, []),
        (0, 40, [0, 1, 2]),
    ],
)
def test_chunk_asks_for_the_items_it_reaches(media: VisualRows, start: int, stop: int, items: list[int]) -> None:
    assert media.unencoded(start, stop) == items


def test_item_is_asked_for_once(media: VisualRows) -> None:
    media.encoded[1] = torch.ones(1, 2)
    assert media.unencoded(0, 40) == [0, 2]


def test_items_are_the_patches_of_their_grids(media: VisualRows) -> None:
    assert [len(media.patches[item]) for item in range(3)] == [8, 4, 8]
    assert media.patches[1].flatten().tolist() == [8, 9, 10, 11]
    assert media.num_rows == [2, 1, 2]


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 8, 14])
def test_chunks_together_have_every_row_in_its_column(media: VisualRows, chunk_size: int) -> None:
    rows = torch.arange(1.0, 6.0).unsqueeze(1)
    embeds = torch.zeros(14, 1)
    for start in range(0, 14, chunk_size):
        chunk = embeds[start : start + chunk_size]
        for item in media.unencoded(start, start + len(chunk)):
            first = [0, 2, 3][item]
            media.encoded[item] = rows[first : first + media.num_rows[item]]
        media.fill(chunk, start)
    assert embeds.flatten().tolist() == [0, 0, 0, 1, 2, 0, 0, 3, 0, 4, 0, 0, 5, 0]


def test_rows_are_kept_until_the_prompt_is_past_them(media: VisualRows) -> None:
    media.encoded = {item: torch.ones(media.num_rows[item], 2) for item in range(3)}
    kept = []
    for start in (0, 4, 5, 8, 12, 13):
        media.forget_before(start)
        kept.append(list(media.encoded))
    assert kept == [[0, 1, 2], [0, 1, 2], [1, 2], [2], [2], []]


def test_placeholders_and_media_must_agree() -> None:
    with pytest.raises(PlaceholderMismatch, match="4 placeholder tokens, but the media give 5 rows"):
        VisualRows(COLUMNS[:4], PATCHES, GRIDS, 4, [b"a", b"b", b"c"])
