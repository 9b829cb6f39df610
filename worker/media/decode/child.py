"""The process that decodes. It opens nothing: it is handed open files, and memory for the pixels."""

import gc
import os
import sys
from functools import partial
from math import prod
from mmap import mmap
from socket import socket
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter
from pydantic_core import to_jsonable_python

from keye.config.codes import ErrorCode
from keye.config.faults import Fault
from keye.config.job import AnyMedia, ImagePart, VideoPart
from keye.worker.media.decode.channel import Channel, Message
from keye.worker.media.decode.image import decode_image
from keye.worker.media.decode.sandbox import allow, confine
from keye.worker.media.faults import named
from keye.worker.media.frames.video import decode_video
from keye.worker.media.limits import check_decoded_bytes
from keye.worker.sizing import Sizing
from keye.worker.telemetry import tell_warnings

NICENESS = 5

# What no message holds: the worker has it.
_PIXELS = {"pixels", "frames"}

_PART: TypeAdapter[ImagePart | VideoPart] = TypeAdapter(AnyMedia)


class Refused(BaseException):
    """The worker wants no more of this medium, for now or at all. No `Exception`: it is no fault of the file."""


def new_pixels(channel: Channel, max_bytes: int, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """Memory of the worker's, which it reads afterwards; at most `max_bytes`. Raises `Refused` where it gives none."""
    check_decoded_bytes(prod(shape), max_bytes)
    channel.send({"allocate": prod(shape)})
    _, handle = channel.receive_file()
    if handle is None:
        raise Refused
    memory = mmap(handle, prod(shape))
    os.close(handle)
    return np.frombuffer(memory, np.uint8).reshape(shape)


def serve(channel: Channel) -> None:
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
        assert handle is not None
        allow(request["max_bytes"])
        with os.fdopen(handle, "rb") as file:
            file.seek(0)  # a child that was refused room before may have read from it
            try:
                with named(request["name"]):
                    answer = _decode(request, file, channel)
            except Refused:
                continue
            except Fault as fault:
                answer = {"fault": fault.code, "message": fault.message}
            except MemoryError:
                message = f"{request['name']}: takes more memory to decode than a decoder may have. Send a smaller one."
                answer = {"fault": ErrorCode.MEDIA_TOO_LARGE, "message": message}
        channel.send(answer)


def _decode(request: Message, file: BinaryIO, channel: Channel) -> Message:
    part = _PART.validate_json(request["part"])
    max_pixels, allocate = request["max_pixels"], partial(new_pixels, channel, request["max_bytes"])
    sizing = Sizing(**request["sizing"])
    if isinstance(part, ImagePart):
        fit = partial(sizing.fit_image, part) if sizing.is_bicubic else None
        image = decode_image(file, max_pixels, allocate, fit)
        return {"image": to_jsonable_python(image, exclude=_PIXELS), "shape": image.pixels.shape}

    def on_frame(done: int, total: int) -> None:
        channel.send({"frame": [done, total]})

    fit_video, decoder, num_threads = sizing.fit_video, request["video_decoder"], request["num_threads"]
    video = decode_video(file, part, fit_video, max_pixels, on_frame, allocate, decoder, num_threads)
    return {"video": to_jsonable_python(video, exclude=_PIXELS), "shape": video.frames.shape}


if __name__ == "__main__":
    _, end, parent = sys.argv
    # Many decode for one engine, and an engine that waits for a core makes all jobs wait.
    os.nice(NICENESS)
    confine(int(parent))
    serve(Channel(socket(fileno=int(end))))
