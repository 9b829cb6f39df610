"""The released variants of Keye-VL, by the `model_type` of their `config.json`; see docs/model.md. Imports no torch."""

from typing import NamedTuple


class Variant(NamedTuple):
    """Preview has neither: a video is one item of attention and one block of positions with a clock, and the projector
    normalises each patch. In 1.5 each frame is an item and a block of its own, and merged patches are normalised.
    """

    splits_video_into_frames: bool
    normalises_merged_patches: bool


VARIANTS = {"Keye": Variant(False, False), "KeyeVL1_5": Variant(True, True)}
