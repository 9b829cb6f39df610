"""Pixels to patches: resizing, telling slow frames from fast ones, normalising, cutting. Knows nothing of prompts."""

from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import PIL.Image

from keye.config.codes import ErrorCode
from keye.config.faults import Fault
from keye.worker.model.checkpoint_files import read_preprocessor
from keye.worker.sizing import MIN_FRAME_TOKENS, Size, Sizing, fit_size, resize

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
    """Patches float32 [sum t*h*w, 3, p, p] in raster order, frame by frame, and their grids (t, h, w)."""

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
        return self._cut(np.asarray(resize(picture, width, height, self.resample))[np.newaxis])

    def process_video(self, video: Video) -> Patches:
        """All frames at one size and in one grid, as Preview sees a video."""
        _require_rgb(video.frames, ndim=4)
        size = self._fit(video, video.size or video.frames.shape[1:3])
        return self._cut(_resize(video.frames, size, self.resample))

    def process_slow_fast_video(self, video: Video) -> Patches:
        """Slow and fast frames each at their own size, in time order, as 1.5 sees a video.

        Neighbours that are to have the same size share a grid. A size given for a kind of frame is met exactly, by
        bilinear interpolation; otherwise frames are fitted as an image is.
        """
        _require_rgb(video.frames, ndim=4)
        sizes = [video.fast_size if kind == 1 else video.size for kind in frame_types(video)]
        fitted = self._fit(video, video.frames.shape[1:3])
        cut: list[Patches] = []
        for exact, run in groupby(range(len(sizes)), key=lambda index: sizes[index]):
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
        grids = tuple(grid for part in cut for grid in part.grids)
        return Patches(np.concatenate([part.values for part in cut]), grids)

    def _fit(self, visual: Image | Video, size: Size) -> Size:
        least, most = visual.min_pixels or self.min_pixels, visual.max_pixels or self.max_pixels
        return fit_size(*size, factor=self.factor, min_pixels=least, max_pixels=most)

    def _cut(self, frames: np.ndarray) -> Patches:
        """uint8 [T, H, W, 3] to normalised patches, each channel first."""
        patch = self.patch_size
        num_frames, rows, columns = len(frames), frames.shape[1] // patch, frames.shape[2] // patch
        pixels = frames.reshape(num_frames, rows, patch, columns, patch, 3).transpose(0, 1, 3, 5, 2, 4)
        values = pixels.reshape(-1, 3, patch, patch).astype(np.float32)
        values *= np.float32(self.rescale_factor)
        # One number a channel, which comes first in a patch.
        values -= np.array(self.image_mean, np.float32)[:, np.newaxis, np.newaxis]
        values /= np.array(self.image_std, np.float32)[:, np.newaxis, np.newaxis]
        return Patches(values, ((num_frames, rows, columns),))


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


def _resize(frames: np.ndarray, size: Size, resample: PIL.Image.Resampling) -> np.ndarray:
    if frames.shape[1:3] == size:
        return frames
    height, width = size
    return np.stack([np.asarray(resize(PIL.Image.fromarray(frame), width, height, resample)) for frame in frames])


def _interpolate(frames: np.ndarray, size: Size) -> np.ndarray:
    """Antialiased bilinear, as 1.5 was trained. Pillow's is one grey level off in up to a quarter of the pixels."""
    # Imported here because `keye-worker plan` reads this file, and should not pay for torch.
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
