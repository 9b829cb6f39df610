"""`keye-worker plan`: what a job's media would become, told without a model. Decodes a frame a video."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from rich.markup import escape
from rich.table import Table

from keye.config.contract import escaped
from keye.config.formats import format_of_file
from keye.config.job import ImagePart, VideoPart
from keye.config.terminal import visible
from keye.worker.media.decode.image import decode_image
from keye.worker.media.faults import named
from keye.worker.media.frames.clip import examine_clip
from keye.worker.media.frames.video_plan import plan_video, tell_joins, tell_thinning
from keye.worker.model.checkpoint_files import VARIANTS, read_config
from keye.worker.model.image_processing import ImageProcessor
from keye.worker.sizing import Size, Sizing

# The limit of who looks at files of their own.
_MAX_PIXELS = 10**9

# Four patches of 3 x 14 x 14 numbers, at 8 bits.
_PATCH_BYTES = 4 * 3 * 14 * 14


@dataclass(frozen=True, slots=True)
class CheckpointFacts:
    """What sizes depend on; `cache_bytes` are those that a token takes in the engine's cache at 16 bits a number."""

    sizing: Sizing
    context: int
    cache_bytes: int

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises `KeyError` or `ValueError` for a folder that is no checkpoint."""
        config = read_config(path)
        return cls(
            sizing=ImageProcessor.from_checkpoint(path).sizing(VARIANTS[config["model_type"]].splits_video_into_frames),
            context=config["max_position_embeddings"],
            cache_bytes=2 * 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"],
        )


@dataclass(frozen=True, slots=True)
class PlannedMedium:
    """Sizes are (height, width). `visual_tokens` of a 1.5 video are the most that a split of its frames comes to."""

    name: str
    type: str
    original_size: Size
    size: Size
    visual_tokens: int
    frames_asked: int = 1
    frames: int = 1
    fps: float | None = None
    duration_seconds: float | None = None
    reasons: tuple[str, ...] = ()
    warning: str | None = None


def part_of(path: Path, **asked: object) -> ImagePart | VideoPart:
    """A part for the file, by its first bytes; `asked` are fields of `VideoPart`, of which an image takes its own."""
    with path.open("rb") as file:
        file_format = format_of_file(file)
    kind = VideoPart if file_format.media_type == "video" else ImagePart
    fields = {name: value for name, value in asked.items() if value is not None and name in kind.model_fields}
    return kind.model_validate({"uri": str(path.absolute()), **fields})


def plan_media(
    parts: Sequence[ImagePart | VideoPart], facts: CheckpointFacts, num_tokens: int, min_frames_per_second: float
) -> list[PlannedMedium]:
    """`parts` name files of this machine; `num_tokens` is what text and answer leave of the context.

    Videos read at less than `min_frames_per_second` have a warning. Raises `Fault` for what cannot be decoded or
    shown.
    """
    sizing = facts.sizing.share(parts, num_tokens)
    return [_plan_medium(part, sizing, min_frames_per_second) for part in parts]


def _plan_medium(part: ImagePart | VideoPart, sizing: Sizing, min_frames_per_second: float) -> PlannedMedium:
    with named(part.uri), open(part.uri, "rb") as file:
        if isinstance(part, ImagePart):
            original_size = decode_image(file, _MAX_PIXELS).original_size
            size = sizing.fit_image(part, *original_size)
            return PlannedMedium(part.uri, part.type, original_size, size, sizing.num_tokens(size))
        clip = examine_clip(file, _MAX_PIXELS)
        plan = plan_video(clip.index, part, sizing.fit_video, clip.upright_size)
        at_most = ("at most: frames in which nothing has moved are left out",) if part.content == "auto" else ()
    return PlannedMedium(
        name=part.uri,
        type=part.type,
        original_size=clip.upright_size,
        size=plan.size,
        visual_tokens=sizing.most_tokens(part, len(plan.wanted), *clip.upright_size),
        frames_asked=plan.frames_asked,
        frames=len(plan.wanted),
        fps=plan.fps,
        duration_seconds=clip.index.duration_seconds,
        reasons=plan.reasons + at_most,
        warning=" ".join([*tell_joins(clip.index), tell_thinning(plan, min_frames_per_second) or ""]).strip() or None,
    )


def max_pixels_for(
    num_tokens: int,
    parts: Sequence[ImagePart | VideoPart],
    planned: Sequence[PlannedMedium],
    facts: CheckpointFacts,
    room: int,
) -> int | None:
    """The largest `max_pixels` with which the same images and frames come to so few tokens; None where none does."""
    sizing = facts.sizing.share(parts, room)
    pixels = sizing.factor**2

    def tokens_at(tokens_a_frame: int) -> int:
        total = 0
        for part, medium in zip(parts, planned, strict=True):
            smaller = part.model_copy(update={"max_pixels": tokens_a_frame * pixels})
            if isinstance(smaller, VideoPart):
                total += sizing.most_tokens(smaller, medium.frames, *medium.original_size)
            else:
                total += sizing.num_tokens(sizing.fit_image(smaller, *medium.original_size))
        return total

    largest = max(medium.size[0] * medium.size[1] for medium in planned) // pixels
    return bisect_right(range(1, largest + 1), num_tokens, key=tokens_at) * pixels or None


def sum_up(planned: Sequence[PlannedMedium], facts: CheckpointFacts, room: int) -> dict[str, int]:
    """What all of them take of memory, and of the context, in which text and answer leave `room`."""
    num_tokens = sum(medium.visual_tokens for medium in planned)
    return {
        "visual_tokens": num_tokens,
        "room": room,
        "pixel_bytes": sum(3 * medium.frames * medium.size[0] * medium.size[1] for medium in planned),
        "patch_bytes": num_tokens * _PATCH_BYTES,
        "cache_bytes": num_tokens * facts.cache_bytes,
    }


def as_lines(planned: Sequence[PlannedMedium], totals: dict[str, int]) -> Iterator[str]:
    """For a terminal that has no room for the table."""
    for medium in planned:
        frames = "" if medium.fps is None else f"{medium.frames} frames ({medium.fps:.3g}/s), "
        sizes = f"{_in_words(medium.original_size)} shown at {_in_words(medium.size)}"
        why = medium.warning or "; ".join(medium.reasons)
        told = f"{frames}{sizes}, {medium.visual_tokens:,} visual tokens{f'; {why}' if why else ''}"
        yield escaped(f"{medium.name.rpartition('/')[2]}: {told}")
    yield f"in all {totals['visual_tokens']:,} of {totals['room']:,} visual tokens; {_memory(totals)}"


def as_table(planned: Sequence[PlannedMedium], totals: dict[str, int]) -> Table:
    table = Table("file", "of", "frames", "shown at", "visual tokens", "why not what was asked", show_footer=True)
    for medium in planned:
        frames = "" if medium.fps is None else f"{medium.frames} ({medium.fps:.3g}/s)"
        why = medium.warning or "; ".join(medium.reasons)
        shown = (_in_words(medium.original_size), frames, _in_words(medium.size), f"{medium.visual_tokens:,}")
        table.add_row(escape(visible(medium.name.rpartition("/")[2])), *shown, escape(visible(why)))
    table.columns[4].footer = f"{totals['visual_tokens']:,} of {totals['room']:,}"
    table.caption = _memory(totals)
    return table


def _memory(totals: dict[str, int]) -> str:
    of = {what: totals[f"{what}_bytes"] / 2**20 for what in ("pixel", "patch", "cache")}
    return f"memory: pixels {of['pixel']:,.0f} MiB, patches {of['patch']:,.0f} MiB, cache {of['cache']:,.0f} MiB"


def _in_words(size: tuple[int, int]) -> str:
    return f"{size[1]}x{size[0]}"
