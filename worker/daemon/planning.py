"""`keye-worker plan`: the plan of a job's media as a table or JSON. What is planned: `tasks.media_plan`."""

import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.table import Table

from keye.worker.tasks.media_plan import CheckpointFacts, PlannedMedium

# Four patches of 3 x 14 x 14 numbers, at 32 bits.
_PATCH_BYTES = 4 * 3 * 14 * 14 * 4


def as_json(planned: Sequence[PlannedMedium], facts: CheckpointFacts, room: int) -> str:
    return json.dumps({"media": [asdict(medium) for medium in planned], **_totals(planned, facts, room)})


def as_table(planned: Sequence[PlannedMedium], facts: CheckpointFacts, room: int) -> Table:
    totals = _totals(planned, facts, room)
    table = Table("file", "of", "frames", "shown at", "visual tokens", "why not what was asked", show_footer=True)
    for medium in planned:
        frames = "" if medium.fps is None else f"{medium.frames} ({medium.fps:.3g}/s)"
        why = medium.warning or "; ".join(medium.reasons)
        shown = (_in_words(medium.original_size), frames, _in_words(medium.size), f"{medium.visual_tokens:,}")
        table.add_row(medium.name.rpartition("/")[2], *shown, why)
    table.columns[4].footer = f"{totals['visual_tokens']:,} of {room:,}"
    table.caption = (
        f"memory: pixels {totals['pixel_bytes'] / 2**20:,.0f} MiB, patches {totals['patch_bytes'] / 2**20:,.0f} MiB, "
        f"cache {totals['cache_bytes'] / 2**20:,.0f} MiB"
    )
    return table


def _totals(planned: Sequence[PlannedMedium], facts: CheckpointFacts, room: int) -> dict[str, int]:
    num_tokens = sum(medium.visual_tokens for medium in planned)
    return {
        "visual_tokens": num_tokens,
        "room": room,
        "pixel_bytes": sum(medium.pixel_bytes for medium in planned),
        "patch_bytes": num_tokens * _PATCH_BYTES,
        "cache_bytes": num_tokens * facts.cache_bytes,
    }


def _in_words(size: tuple[int, int]) -> str:
    return f"{size[1]}x{size[0]}"
