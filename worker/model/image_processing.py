"""Pixels to patches: the rule for sizes, resizing, normalising and cutting. Knows nothing of prompts."""

import json
import math
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import PIL.Image

from keye.config.faults import Fault
from keye.config.outcome import ErrorCode
from keye.worker.media.resize import resize
from keye.worker.model.visual_input import Image, Size, Video

MAX_ASPECT_RATIO = 200

# Of an image, where a checkpoint does not say otherwise.
MIN_PIXELS = 256 * 28 * 28
MAX_PIXELS = 1280 * 28 * 28


@dataclass(frozen=True, eq=False)
class Patches:
    """Patches float32 [sum t*h*w, 3, p, p] in raster order, frame by frame, and their grids (t, h, w)."""

    values: np.ndarray
    grids: tuple[tuple[int, int, int], ...]


def fit_size(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int) -> Size:
    """The size an image is resized to: sides are multiples of `factor`, the area stays within the two limits where
    whole factors allow it, the aspect ratio is kept as nearly as that leaves room for.

    Raises `Fault` when one side is more than 200 times the other.
    """
    if height < factor:
        height, width = factor, round(width * factor / height)
    if width < factor:
        height, width = round(height * factor / width), factor
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise Fault(
            ErrorCode.MEDIA_UNSUPPORTED,
            f"an image of {width}x{height} pixels has an aspect ratio of "
            f"{max(height, width) / min(height, width):.0f}, "
            f"the limit is {MAX_ASPECT_RATIO}; crop it",
        )
    fitted_height, fitted_width = round(height / factor) * factor, round(width / factor) * factor
    if fitted_height * fitted_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        fitted_height = max(factor, math.floor(height / shrink / factor) * factor)
        fitted_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif fitted_height * fitted_width < min_pixels:
        stretch = math.sqrt(min_pixels / (height * width))
        fitted_height = math.ceil(height * stretch / factor) * factor
        fitted_width = math.ceil(width * stretch / factor) * factor
    return fitted_height, fitted_width


class ImageProcessor:
    """Does what `preprocessor_config.json` of a checkpoint says; both variants use it."""

    def __init__(
        self,
        *,
        min_pixels: int,
        max_pixels: int,
        patch_size: int,
        merge_size: int,
        image_mean: tuple[float, ...],
        image_std: tuple[float, ...],
        rescale_factor: float = 1 / 255,
        resample: int = PIL.Image.Resampling.BICUBIC,
    ) -> None:
        self.min_pixels = min_pixels
        self.max_pixels = max_pixels
        self.patch_size = patch_size
        self.merge_size = merge_size
        self.resample = PIL.Image.Resampling(resample)
        self.rescale_factor = np.float32(rescale_factor)
        # One number a channel, shaped to broadcast over patches that have their channel first.
        self._mean = np.array(image_mean, dtype=np.float32)[:, np.newaxis, np.newaxis]
        self._std = np.array(image_std, dtype=np.float32)[:, np.newaxis, np.newaxis]

    @classmethod
    def from_checkpoint(cls, path: Path | str) -> "ImageProcessor":
        config = json.loads((Path(path) / "preprocessor_config.json").read_text(encoding="utf-8"))
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
            resample=config.get("resample", PIL.Image.Resampling.BICUBIC),
        )

    @property
    def factor(self) -> int:
        """Pixels of a side that become one token: patch times merge."""
        return self.patch_size * self.merge_size

    def process_image(self, image: Image) -> Patches:
        picture = image.pixels
        if isinstance(picture, np.ndarray):
            _require_rgb(picture, ndim=3)
            picture = PIL.Image.fromarray(picture)
        picture = picture.convert("RGB")
        height, width = self._target(image, (picture.height, picture.width))
        return self._cut(np.asarray(resize(picture, width, height, self.resample))[np.newaxis])

    def process_video(self, video: Video) -> Patches:
        """All frames at one size and in one grid, as Preview sees a video."""
        _require_rgb(video.frames, ndim=4)
        size = self._target(video, video.frames.shape[1:3])
        return self._cut(_resize(video.frames, size, self.resample))

    def process_slow_fast_video(self, video: Video) -> Patches:
        """Slow and fast frames each at their own size, in time order, as 1.5 sees a video.

        Neighbours of equal size share a grid. A size given for a kind of frame is met exactly, by bilinear
        interpolation; otherwise frames are fitted as an image is.
        """
        _require_rgb(video.frames, ndim=4)
        types = frame_types(video)
        fitted = fit_size(*video.frames.shape[1:3], factor=self.factor, **self._limits(video))
        cut: list[Patches] = []
        for is_fast, run in groupby(range(len(types)), key=lambda index: types[index] == 1):
            exact = video.fast_size if is_fast else video.size
            frames = video.frames[list(run)]
            if exact is None:
                resized = _resize(frames, fitted, self.resample)
            elif exact[0] % self.factor or exact[1] % self.factor:
                raise Fault(
                    ErrorCode.MEDIA_UNSUPPORTED,
                    f"frame size {exact[1]}x{exact[0]}: both sides must be multiples of {self.factor}",
                )
            else:
                resized = _interpolate(frames, exact)
            cut.append(self._cut(resized))
        return join_patches(cut)

    def _limits(self, visual: Image | Video) -> dict[str, int]:
        return {
            "min_pixels": visual.min_pixels or self.min_pixels,
            "max_pixels": visual.max_pixels or self.max_pixels,
        }

    def _target(self, visual: Image | Video, size: Size) -> Size:
        height, width = visual.size or size
        return fit_size(height, width, factor=self.factor, **self._limits(visual))

    def _cut(self, frames: np.ndarray) -> Patches:
        """uint8 [T, H, W, 3] to normalised patches, each channel first."""
        patch = self.patch_size
        num_frames, rows, columns = len(frames), frames.shape[1] // patch, frames.shape[2] // patch
        pixels = frames.reshape(num_frames, rows, patch, columns, patch, 3).transpose(0, 1, 3, 5, 2, 4)
        values = pixels.reshape(-1, 3, patch, patch).astype(np.float32)
        values *= self.rescale_factor
        values -= self._mean
        values /= self._std
        return Patches(values, ((num_frames, rows, columns),))


def frame_types(video: Video) -> tuple[int, ...]:
    """0 for each slow frame, 1 for each fast one."""
    types = video.frame_types or (0,) * len(video.frames)
    if len(types) != len(video.frames):
        raise Fault(ErrorCode.MEDIA_UNSUPPORTED, f"{len(types)} frame types came with {len(video.frames)} frames")
    return types


def join_patches(parts: list[Patches]) -> Patches:
    """Items one behind the other; neighbours of equal size become one grid."""
    grids = [grid for part in parts for grid in part.grids]
    merged = tuple(
        (sum(t for t, _, _ in run), h, w)
        for (h, w), group in groupby(grids, key=lambda grid: grid[1:])
        for run in [list(group)]
    )
    return Patches(np.concatenate([part.values for part in parts]), merged)


def _resize(frames: np.ndarray, size: Size, resample: PIL.Image.Resampling) -> np.ndarray:
    if frames.shape[1:3] == size:
        return frames
    height, width = size
    return np.stack([np.asarray(resize(PIL.Image.fromarray(frame), width, height, resample)) for frame in frames])


def _interpolate(frames: np.ndarray, size: Size) -> np.ndarray:
    """Antialiased bilinear, as 1.5 was trained. Pillow's is one grey level off in up to a quarter of the pixels."""
    # Imported here because all else in this file runs in decoder processes, which should not pay for torch.
    import torch

    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(pixels, size=size, mode="bilinear", antialias=True)
    return resized.permute(0, 2, 3, 1).numpy()


def _require_rgb(pixels: np.ndarray, ndim: int) -> None:
    if pixels.dtype != np.uint8 or pixels.ndim != ndim or pixels.shape[-1] != 3 or 0 in pixels.shape:
        expected = "[H, W, 3]" if ndim == 3 else "[T, H, W, 3]"
        raise Fault(
            ErrorCode.MEDIA_UNSUPPORTED,
            f"pixels are {pixels.dtype} {list(pixels.shape)}, expected uint8 {expected} with no side empty",
        )
