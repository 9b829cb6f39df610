"""What a decoder child says of a medium, and what of it is believed: a medium may have taken it over.

Whatever cannot be raises `Nonsense`.
"""

import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from mmap import mmap
from typing import get_args

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter

from keye.config.codes import ErrorCode
from keye.config.faults import Fault
from keye.config.job import ImagePart, VideoPart
from keye.config.settings import VideoDecoder
from keye.worker.media.decode.channel import Message, Nonsense
from keye.worker.media.decoded import Decoded, DecodedImage, DecodedVideo
from keye.worker.media.frames.video_plan import MAX_FRAMES, is_of_rule
from keye.worker.media.limits import MediaLimits
from keye.worker.sizing import Size, Sizing

# What a file can be to blame for. Others would have the job tried again, or say that it was cancelled.
_CODES = (ErrorCode.MEDIA_CORRUPT, ErrorCode.MEDIA_TOO_LARGE, ErrorCode.MEDIA_UNSUPPORTED, ErrorCode.INVALID_JOB)
_MAX_SENTENCE = 1000
_MAX_SENTENCES = 10
# What callers' columns hold.
_MAX_COUNT = 2**63
# FFmpeg's fractions are of two such numbers.
_MAX_TICK = 2**31

_DECODED: TypeAdapter[Decoded] = TypeAdapter(Decoded, config={"arbitrary_types_allowed": True, "allow_inf_nan": False})


class Progress:
    """Of a video: how many frames are done, from one telling to the next."""

    def __init__(self, part: ImagePart | VideoPart) -> None:
        self._max_frames = (part.max_frames or MAX_FRAMES) if isinstance(part, VideoPart) else 0
        self._done = self._num_told = 0
        self._total: int | None = None

    def tell(self, done: int, total: int) -> None:
        """The number may stay what it was: where another decoder steps in, it reads the frames before again."""
        self._total = self._total or total
        self._num_told += 1
        is_ahead = max(self._done, 1) <= done <= total == self._total <= self._max_frames
        if not is_ahead or self._num_told > 2 * done:
            raise Nonsense(f"frame {done} of {total} after {self._done} of {self._total}")
        self._done = done


def read_fault(code: str, sentence: str) -> Fault:
    if code not in _CODES:
        raise Nonsense(f"a fault {code:.40}")
    return Fault(ErrorCode(code), _in_one_line(sentence))


def read_image(
    facts: Message, shape: list[int], memory: mmap | None, part: ImagePart, sizing: Sizing, limits: MediaLimits
) -> DecodedImage:
    """Memory and tokens from here on follow from its size, which is the rule's to say."""
    with _no_other_errors():
        image = _DECODED.validate_python({**facts, "pixels": _pixels(memory, shape)})
        assert isinstance(image, DecodedImage)
        _require_possible(image.original_size, limits)
        size = sizing.fit_image(part, *image.original_size) if sizing.is_bicubic else image.original_size
        if image.pixels.shape != (*size, 3):
            raise Nonsense(f"{image.pixels.shape} of {image.original_size}")
        if not 0 <= image.rows_corrupt <= image.original_size[0] + image.original_size[1]:
            raise Nonsense(f"{image.rows_corrupt} corrupt rows of {image.original_size}")
        warnings, file_format = _in_lines(image.warnings), _in_one_line(image.format)
    return replace(image, warnings=warnings, format=file_format)


def read_video(
    facts: Message, shape: list[int], memory: mmap | None, part: VideoPart, sizing: Sizing, limits: MediaLimits
) -> DecodedVideo:
    """The same holds for the size and the number of its frames."""
    with _no_other_errors():
        video = _DECODED.validate_python({**facts, "frames": _pixels(memory, shape)})
        assert isinstance(video, DecodedVideo)
        plan = video.plan
        _require_possible(video.original_size, limits)
        is_whole = video.frames.shape == (len(plan.wanted), *plan.size, 3) and video.decoder in get_args(VideoDecoder)
        is_timed = len(video.ticks) == len(plan.wanted) and all(0 < each < _MAX_TICK for each in video.tick_seconds)
        is_timed = is_timed and all(abs(each) < _MAX_COUNT for each in video.timestamps_seconds)
        counts = (video.frames_corrupt, plan.frames_there, plan.frames_asked, plan.frames_still, plan.cuts or 0)
        is_counted = all(0 <= count < _MAX_COUNT for count in (*counts, video.duration_seconds))
        is_counted &= plan.fps > 0 and plan.fps_asked > 0
        if not (is_whole and is_timed and is_counted):
            raise Nonsense(f"{video.frames.shape} by {reprlib.repr(facts)}")
        if not is_of_rule(plan, part, sizing.fit_video, video.original_size):
            raise Nonsense(f"{video.frames.shape} of {video.original_size}")
        plan = replace(plan, reasons=_in_lines(plan.reasons))
        file_format, codec = _in_one_line(video.format), _in_one_line(video.codec)
        warnings = _in_lines(video.warnings)
    return replace(video, plan=plan, format=file_format, codec=codec, warnings=warnings)


@contextmanager
def _no_other_errors() -> Iterator[None]:
    """Values of the wrong type, and those that no sum can be made with."""
    try:
        yield
    except (ValueError, TypeError, ArithmeticError) as error:
        raise Nonsense(f"facts that are none: {type(error).__name__}") from None


def _pixels(memory: mmap | None, shape: list[int]) -> npt.NDArray[np.uint8]:
    if memory is None:
        raise Nonsense("that it is done, without having asked for memory")
    # Of a video, some of it may have turned out to stand still.
    pixels = np.frombuffer(memory, np.uint8, prod(shape)).reshape(shape)
    pixels.setflags(write=False)  # other jobs may be given them too
    return pixels


def _require_possible(size: Size, limits: MediaLimits) -> None:
    if not (min(size) > 0 and prod(size) <= limits.max_image_pixels):
        raise Nonsense(f"a size of {reprlib.repr(size)}")


def _in_lines(sentences: tuple[str, ...]) -> tuple[str, ...]:
    if len(sentences) > _MAX_SENTENCES:
        raise Nonsense(f"{len(sentences)} sentences")
    return tuple(map(_in_one_line, sentences))


def _in_one_line(text: str) -> str:
    """For callers and logs: what is no letter, digit or sign is written as Python does."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:_MAX_SENTENCE])[:_MAX_SENTENCE]
