"""The process that decodes. It opens nothing: it is handed open files, and memory for the pixels."""

import ctypes
import errno
import gc
import os
from collections.abc import Callable
from functools import partial
from io import BufferedReader, FileIO
from math import prod
from mmap import mmap
from socket import socket
from typing import Any, BinaryIO, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter
from pydantic_core import to_jsonable_python

from keye.config.codes import ErrorCode
from keye.config.faults import Fault
from keye.config.job import AnyMedia, ImagePart, VideoPart
from keye.config.settings import VideoDecoder
from keye.worker.media.decode.channel import Channel, Message
from keye.worker.media.decode.image import decode_image, load_readers
from keye.worker.media.decode.sandbox import confine
from keye.worker.media.faults import named
from keye.worker.media.frames.video import decode_video, load_decoder
from keye.worker.media.limits import check_decoded_bytes
from keye.worker.sizing import Sizing
from keye.worker.telemetry import tell_warnings

_M_ARENA_MAX = -8  # malloc.h

# What no message holds: the worker has it.
_PIXELS = {"pixels", "frames"}

Done = TypeVar("Done")

_PART: TypeAdapter[ImagePart | VideoPart] = TypeAdapter(AnyMedia)


# Neither is an `Exception`, of which the readers of files make faults of the file.
class Refused(BaseException):
    """The worker wants no more of this medium, for now or at all."""


class NoHandle(BaseException):
    """This process may hold no more files."""


class MediumFile(FileIO):
    """An open file is read without fault, but for its disk or its server: `failed_at` is where that had one.

    Noted here, since libraries take it for the end of the file, or say something else.
    """

    failed_at: int | None = None

    def readinto(self, buffer: Any) -> int | None:
        return self._noting(super().readinto, buffer)

    def readall(self) -> bytes:
        return self._noting(super().readall)

    def seek(self, *where: int) -> int:
        return self._noting(super().seek, *where)

    def _noting(self, act: Callable[..., Done], *on: Any) -> Done:
        try:
            return act(*on)
        except OSError:
            self.failed_at = os.lseek(self.fileno(), 0, os.SEEK_CUR)
            raise


def new_pixels(channel: Channel, max_bytes: int, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """Memory of the worker's, which it reads afterwards; at most `max_bytes`. Raises `Refused` where it gives none."""
    check_decoded_bytes(prod(shape), max_bytes)
    channel.send({"allocate": prod(shape)})
    answer, handle = channel.receive_file()
    if not answer["granted"]:
        raise Refused
    if handle is None:
        raise NoHandle
    try:
        memory = mmap(handle, prod(shape))
    except OSError as error:
        raise (NoHandle if error.errno == errno.EMFILE else MemoryError) from None
    finally:
        os.close(handle)
    return np.frombuffer(memory, np.uint8).reshape(shape)


def serve(channel: Channel, decoder: VideoDecoder) -> None:
    """Decode what comes until the worker closes its end."""
    gc.freeze()  # what is imported is never garbage
    channel.send({"started": True})
    while True:
        # PyAV's decoders are in cycles, each with its threads and the frames it refers to.
        gc.collect()
        tell_warnings()
        try:
            request, handle = channel.receive_file()
        except EOFError:
            return
        if handle is None:
            channel.send({"has_no_handle": True})
            continue
        channel.send({"begun": True})
        medium = MediumFile(handle)
        with BufferedReader(medium) as file:
            try:
                answer = _answer(request, file, channel, decoder)
            except OSError:
                if medium.failed_at is None:
                    raise
                answer = {}
        if answer is not None and medium.failed_at is not None:
            answer = {"unreadable_at": medium.failed_at}
        if answer is not None:
            channel.send(answer)


def _answer(request: Message, file: BinaryIO, channel: Channel, decoder: VideoDecoder) -> Message | None:
    """None where the worker wants none."""
    try:
        file.seek(0)  # a child that was refused room before may have read from it
        with named(request["name"]):
            return _decode(request, file, channel, decoder)
    except Fault as fault:
        return {"fault": fault.code, "sentence": fault.message, "is_doubtful": _is_of_memory(fault)}
    except MemoryError:
        told = f"{request['name']}: takes more memory to decode than a decoder may have. Send a smaller one."
        return {"fault": ErrorCode.MEDIA_TOO_LARGE, "sentence": told, "is_doubtful": True}
    except Refused:
        return None
    except NoHandle:
        return {"has_no_handle": True}


def _is_of_memory(error: BaseException | None) -> bool:
    """FFmpeg's own word for it is a fault of the medium already."""
    return error is not None and (isinstance(error, MemoryError) or _is_of_memory(error.__context__))


def _decode(request: Message, file: BinaryIO, channel: Channel, decoder: VideoDecoder) -> Message:
    part = _PART.validate_json(request["part"])
    max_pixels, allocate = request["max_pixels"], partial(new_pixels, channel, request["max_bytes"])
    sizing = Sizing(**request["sizing"])
    if isinstance(part, ImagePart):
        fit = partial(sizing.fit_image, part) if sizing.is_bicubic else None
        image = decode_image(file, max_pixels, allocate, fit)
        return {"image": to_jsonable_python(image, exclude=_PIXELS), "shape": image.pixels.shape}

    def on_frame(done: int, total: int) -> None:
        channel.send({"frame": [done, total]})

    fit_video, num_threads = sizing.fit_video, request["num_threads"]
    video = decode_video(file, part, fit_video, max_pixels, on_frame, allocate, decoder, num_threads)
    return {"video": to_jsonable_python(video, exclude=_PIXELS), "shape": video.frames.shape}


def main(end: int, parent_pid: int, decoder: VideoDecoder) -> None:
    """`end` is the handle of its socket."""
    # Arenas, of which the C library would make eight a core, waste the address space.
    ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 2)
    channel = Channel(socket(fileno=end))
    load_readers()
    load_decoder(decoder)
    confine(parent_pid)
    serve(channel, decoder)
