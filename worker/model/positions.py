"""Where each token of a prompt stands: temporal, height and width position ids. Pure; the angles are in `rotary.py`."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from keye.worker.model.configuration_keye import KeyeConfig

Grid = Sequence[int]  # frames, rows, columns in patches
_Item = tuple[Tensor, int, int]  # clock, rows, columns in patches


class PlaceholderMismatch(ValueError):
    """The placeholders of a prompt and the images or videos given with it do not fit together."""


def position_ids(
    input_ids: Tensor,
    config: KeyeConfig,
    image_grids: Iterable[Grid] = (),
    video_grids: Sequence[Grid] = (),
    seconds_per_frame: Sequence[float] | None = None,
) -> tuple[Tensor, int]:
    """Position ids int64 [3, L] of one unpadded sequence [L] and its rope delta.

    Text counts up in all three rows. A run of placeholders for an item of (t, h, w) merged patches takes
    (cur + clock(k), cur + i, cur + j), and the count goes on behind the largest. The clock stands still except in a
    video that is one item, where frame k reads trunc(k * seconds_per_frame * tokens_per_second), in float32 (one
    second a frame where it is None). The token generated in column n stands at n + delta in all rows.

    Raises `PlaceholderMismatch` when runs and grids differ in number or length.
    """
    visual = (input_ids == config.image_token_id) | (input_ids == config.video_token_id)
    # A run ends where the next token is of another kind, so an image right beside a video is two runs.
    kinds = torch.where(visual, input_ids, -1)
    edges = (kinds[1:] != kinds[:-1]).nonzero().flatten().add(1).tolist()
    starts, ends = [0, *edges], [*edges, len(kinds)]

    merge_size = config.vision_config.spatial_merge_size
    still = torch.zeros(1, dtype=torch.long)
    images: Iterator[_Item] = ((still, rows, columns) for _, rows, columns in image_grids)
    if config.splits_video_into_frames:
        videos: Iterator[_Item] = ((still, rows, columns) for num, rows, columns in video_grids for _ in range(num))
    else:
        seconds = seconds_per_frame or [1.0] * len(video_grids)
        videos = (
            (_clock(frames, each, config.vision_config.tokens_per_second), rows, columns)
            for (frames, rows, columns), each in zip(video_grids, seconds, strict=True)
        )
    media = {config.image_token_id: ("image", images), config.video_token_id: ("video", videos)}

    blocks: list[Tensor] = []
    cur = 0
    for start, end, kind in zip(starts, ends, kinds[starts].tolist(), strict=True):
        if kind == -1:
            block = torch.arange(end - start).expand(3, -1)
        else:
            name, items = media[kind]
            item = next(items, None)
            if item is None:
                raise PlaceholderMismatch(f"the prompt has more runs of {name} placeholders than grids came with it")
            clock, rows, columns = item[0], item[1] // merge_size, item[2] // merge_size
            if end - start != len(clock) * rows * columns:
                raise PlaceholderMismatch(
                    f"a run of {end - start} {name} placeholders meets an item of {len(clock)}x{rows}x{columns} tokens"
                )
            axes = torch.meshgrid(clock, torch.arange(rows), torch.arange(columns), indexing="ij")
            block = torch.stack(axes).flatten(1)
        blocks.append(block + cur)
        cur += int(block.max()) + 1
    for name, items in media.values():
        if next(items, None) is not None:
            raise PlaceholderMismatch(f"more {name} grids came with the prompt than it has runs of placeholders")
    return torch.cat(blocks, dim=1), cur - len(kinds)


def _clock(frames: int, seconds_per_frame: float, tokens_per_second: float) -> Tensor:
    seconds = torch.arange(frames, dtype=torch.float32) * torch.tensor(seconds_per_frame, dtype=torch.float32)
    return (seconds * tokens_per_second).long()
