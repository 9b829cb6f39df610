"""Pixels to patches: resizing, telling slow frames from fast ones, cutting, normalising. Knows nothing of prompts."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image

from keye.config.codes import ErrorCode
from keye.config.faults import Fault
from keye.worker.model.checkpoint_files import read_preprocessor
from keye.worker.sizing import MIN_FRAME_TOKENS, Size, Sizing, fit_size, resize

if TYPE_CHECKING:
    from torch import Tensor

# Of an image, where a checkpoint does not say otherwise.
MIN_PIXELS = 256 * 28 * 28
MAX_PIXELS = 1280 * 28 * 28

# Frames compared in one call, each as 2.4 MB of floats at most.
_WINDOW = 64


@dataclass(frozen=True, eq=False)
class Image:
    """One picture: RGB of any PIL mode, or uint8 [H, W, 3]. Limits left out are the checkpoint's own."""

    pixels: PIL.Image.Image | np.ndarray
    min_pixels: int | None = None
    max_pixels: int | None = None
    size: Size | None = None
    """Shown as if it had this size; the rule for sizes still rounds and limits it."""


@dataclass(frozen=True, eq=False)
class Video:
    """The sampled frames of one video, uint8 [T, H, W, 3], in time order."""

    frames: np.ndarray
    fps: float = 2.0
    """Sampled frames a second. Preview's clock runs on it; 1.5 reads `timestamps` instead."""
    min_pixels: int | None = None
    max_pixels: int | None = None
    size: Size | None = None
    """Preview: as for an image. 1.5: the exact size of slow frames, both sides multiples of 28."""
    fast_size: Size | None = None
    """1.5 only: the exact size of fast frames."""
    frame_types: tuple[int, ...] | None = None
    """1.5 only: 0 for a slow frame, 1 for a fast one; all slow when left out."""
    timestamps: tuple[float, ...] | None = None
    """1.5 only: seconds from the start, one a frame; left out of the prompt when left out here."""


@dataclass(frozen=True, eq=False)
class Patches:
    """Patches uint8 [sum t*h*w, 3, p, p] in raster order, frame by frame, and their grids (t, h, w).

    The memory is their own: nothing of it is the picture's or the video's.
    """

    values: np.ndarray
    grids: tuple[tuple[int, int, int], ...]


@dataclass(kw_only=True, eq=False)
class ImageProcessor:
    """Does what `preprocessor_config.json` of a checkpoint says; both variants use it."""

    min_pixels: int
    max_pixels: int
    patch_size: int
    merge_size: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    rescale_factor: float = 1 / 255
    resample: PIL.Image.Resampling = PIL.Image.Resampling.BICUBIC

    @classmethod
    def from_checkpoint(cls, path: Path | str) -> "ImageProcessor":
        config = read_preprocessor(Path(path))
        for step in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
            if config.get(step) is False:
                raise ValueError(
                    f"{path}/preprocessor_config.json turns {step} off, and Keye-VL is not defined without"
                )
        if (temporal := config.get("temporal_patch_size", 1)) != 1:
            raise ValueError(f"{path}/preprocessor_config.json has temporal_patch_size {temporal}, Keye-VL has 1")
        area = config.get("size") or {}
        return cls(
            min_pixels=config.get("min_pixels", area.get("min_pixels", MIN_PIXELS)),
            max_pixels=config.get("max_pixels", area.get("max_pixels", MAX_PIXELS)),
            patch_size=config["patch_size"],
            merge_size=config["merge_size"],
            image_mean=tuple(config["image_mean"]),
            image_std=tuple(config["image_std"]),
            rescale_factor=config.get("rescale_factor", 1 / 255),
            resample=PIL.Image.Resampling(config.get("resample", PIL.Image.Resampling.BICUBIC)),
        )

    @property
    def factor(self) -> int:
        """Pixels of a side that become one token: patch times merge."""
        return self.patch_size * self.merge_size

    def sizing(self, splits_video_into_frames: bool) -> Sizing:
        """The rule for sizes of the checkpoint, whose variant says how it sees videos."""
        is_bicubic = self.resample == PIL.Image.Resampling.BICUBIC
        return Sizing(self.factor, self.min_pixels, self.max_pixels, splits_video_into_frames, is_bicubic)

    def process_image(self, image: Image) -> Patches:
        picture = image.pixels
        if isinstance(picture, np.ndarray):
            _require_rgb(picture, ndim=3)
            picture = PIL.Image.fromarray(picture)
        picture = picture.convert("RGB")
        height, width = self._fit(image, image.size or (picture.height, picture.width))
        return self._cut([(1, height, width)], [np.asarray(resize(picture, width, height, self.resample))])

    def process_video(self, video: Video) -> Patches:
        """All frames at one size and in one grid, as Preview sees a video."""
        _require_rgb(video.frames, ndim=4)
        size = self._fit(video, video.size or video.frames.shape[1:3])
        return self._cut([(len(video.frames), *size)], (_resize(frame, size, self.resample) for frame in video.frames))

    def process_slow_fast_video(self, video: Video) -> Patches:
        """Slow and fast frames each at their own size, in time order, as 1.5 sees a video.

        Neighbours that are to have the same size share a grid. A size given for a kind of frame is met exactly, by
        bilinear interpolation; otherwise frames are fitted as an image is.
        """
        _require_rgb(video.frames, ndim=4)
        sizes = [video.fast_size if kind == 1 else video.size for kind in frame_types(video)]
        fitted = self._fit(video, video.frames.shape[1:3])
        for size in filter(None, dict.fromkeys(sizes)):
            if size[0] % self.factor or size[1] % self.factor:
                raise Fault(
                    ErrorCode.MEDIA_UNSUPPORTED,
                    f"frame size {size[1]}x{size[0]}: both sides must be multiples of {self.factor}",
                )
        return self._cut(
            [(len(list(run)), *(exact or fitted)) for exact, run in groupby(sizes)],
            (
                _interpolate(frame, exact) if exact else _resize(frame, fitted, self.resample)
                for frame, exact in zip(video.frames, sizes, strict=True)
            ),
        )

    def normalise(self, patches: "Tensor") -> "Tensor":
        """uint8 [n, 3, p, p] to float32 on the same device: x * rescale_factor, (x - mean) / std, each rounded."""
        # Imported here because `keye-worker plan` reads this file, and should not pay for torch.
        from keye.worker.model.device import send

        # One number a channel, which comes first in a patch. By a number alone CUDA would not divide: it multiplies
        # with the reciprocal, which rounds otherwise.
        mean, std = (
            send(np.array(of_channels, np.float32)[:, np.newaxis, np.newaxis], patches.device)
            for of_channels in (self.image_mean, self.image_std)
        )
        return patches.float().mul_(self.rescale_factor).sub_(mean).div_(std)

    def _fit(self, visual: Image | Video, size: Size) -> Size:
        least, most = visual.min_pixels or self.min_pixels, visual.max_pixels or self.max_pixels
        return fit_size(*size, factor=self.factor, min_pixels=least, max_pixels=most)

    def _cut(self, runs: Sequence[tuple[int, int, int]], frames: Iterable[np.ndarray]) -> Patches:
        """Frames uint8 [H, W, 3], in runs of (T, H, W), to patches, each channel first: a grid a run."""
        patch = self.patch_size
        grids = tuple((num_frames, height // patch, width // patch) for num_frames, height, width in runs)
        values = np.empty((sum(map(prod, grids)), 3, patch, patch), np.uint8)
        stop = 0
        # One by one to where they stay: a video may be 100 MB.
        for frame in frames:
            rows, columns = frame.shape[0] // patch, frame.shape[1] // patch
            pixels = frame.reshape(rows, patch, columns, patch, 3).transpose(0, 2, 4, 1, 3)
            start, stop = stop, stop + rows * columns
            values[start:stop].reshape(pixels.shape)[:] = pixels
        return Patches(values, grids)


def frame_types(video: Video) -> tuple[int, ...]:
    """0 for each slow frame, 1 for each fast one."""
    types = video.frame_types or (0,) * len(video.frames)
    if len(types) != len(video.frames):
        raise Fault(ErrorCode.MEDIA_UNSUPPORTED, f"{len(types)} frame types came with {len(video.frames)} frames")
    return types


def tell_slow_from_fast(frames: np.ndarray) -> tuple[int, ...]:
    """0 for each slow frame of uint8 [T, H, W, 3], 1 for each fast one: one that is like the latest slow frame."""
    # Imported here because they bring OpenCV and torchvision along, which only videos of 1.5 have a use for.
    import torch
    from keye_vl_utils.vision_process import extract_slow_fast_frames

    # The utilities fail on frames that are one row of patches when they have shrunk them.
    least, most = MIN_FRAME_TOKENS * 784, 256 * 784
    if fit_size(*frames.shape[1:3], factor=28, min_pixels=least, max_pixels=most)[0] == 28:
        return (0,) * len(frames)
    types = [0]
    for start in range(1, len(frames), _WINDOW):
        # What follows depends on the latest slow frame and on nothing before it.
        latest_slow = max(index for index, kind in enumerate(types) if kind == 0)
        window = frames[[latest_slow, *range(start, min(start + _WINDOW, len(frames)))]]
        types += extract_slow_fast_frames(torch.from_numpy(window).permute(0, 3, 1, 2))[1:].tolist()
    return tuple(types)


def _resize(frame: np.ndarray, size: Size, resample: PIL.Image.Resampling) -> np.ndarray:
    if frame.shape[:2] == size:
        return frame
    height, width = size
    return np.asarray(resize(PIL.Image.fromarray(frame), width, height, resample))


def _interpolate(frame: np.ndarray, size: Size) -> np.ndarray:
    """Antialiased bilinear, as 1.5 was trained. Pillow's is one grey level off in up to a quarter of the pixels."""
    if frame.shape[:2] == size:
        return frame
    # Imported here because `keye-worker plan` reads this file, and should not pay for torch.
    import torch

    # Torch warns of memory that nobody may write to.
    pixels = torch.from_numpy(np.require(frame, requirements="W")).permute(2, 0, 1).unsqueeze(0)
    resized = torch.nn.functional.interpolate(pixels, size=size, mode="bilinear", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def _require_rgb(pixels: np.ndarray, ndim: int) -> None:
    if pixels.dtype != np.uint8 or pixels.ndim != ndim or pixels.shape[-1] != 3 or 0 in pixels.shape:
        expected = "[H, W, 3]" if ndim == 3 else "[T, H, W, 3]"
        raise Fault(
            ErrorCode.MEDIA_UNSUPPORTED,
            f"pixels are {pixels.dtype} {list(pixels.shape)}, expected uint8 {expected} with no side empty",
        )
