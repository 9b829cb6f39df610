"""The process that decodes. It opens nothing: it is handed open files, and memory for the pixels."""

import gc
import json
import os
import sys
from dataclasses import fields
from functools import partial
from math import prod
from mmap import mmap
from socket import socket
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from pydantic_core import to_jsonable_python

from keye.config.codes import ErrorCode
from keye.config.faults import Fault
from keye.config.job import ImagePart, VideoPart
from keye.worker.media.decode.channel import Channel, Message
from keye.worker.media.decode.image import decode_image
from keye.worker.media.decode.sandbox import allow, confine
from keye.worker.media.decoded import Decoded, DecodedImage
from keye.worker.media.frames.video import decode_video
from keye.worker.sizing import Sizing
from keye.worker.telemetry import tell_warnings

NICENESS = 5

_PARTS: dict[str, type[ImagePart] | type[VideoPart]] = {"image": ImagePart, "video": VideoPart}


class Refused(BaseException):
    """The worker wants no more of this medium, for now or at all. No `Exception`: it is no fault of the file."""


class Parent:
    """What the child asks of the worker that started it."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def new_pixels(self, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
        self._channel.send({"allocate": prod(shape)})
        _, handle = self._channel.receive_file()
        if handle is None:
            raise Refused
        memory = mmap(handle, prod(shape))
        os.close(handle)
        return np.frombuffer(memory, np.uint8).reshape(shape)

    def on_frame(self, done: int, total: int) -> None:
        self._channel.send({"frame": [done, total]})


def serve(channel: Channel) -> None:
    """Decode what comes until the worker closes its end."""
    parent = Parent(channel)
    gc.freeze()  # what is imported is never garbage
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
                answer = _decode(request, file, parent)
            except Refused:
                continue
            except Fault as fault:
                answer = {"fault": fault.code, "message": fault.message}
            except MemoryError:
                message = f"{request['name']}: takes more memory to decode than a decoder may have. Send a smaller one."
                answer = {"fault": ErrorCode.MEDIA_TOO_LARGE, "message": message}
        channel.send(answer)


def _decode(request: Message, file: BinaryIO, parent: Parent) -> Message:
    # Where it came from is not the child's business, and may be a secret.
    part = _PARTS[request["part"]["type"]].model_validate_json(json.dumps({**request["part"], "uri": "file:"}))
    name, max_pixels, max_bytes = request["name"], request["max_pixels"], request["max_bytes"]
    sizing = Sizing(**request["sizing"])
    if isinstance(part, ImagePart):
        fit = partial(sizing.fit_image, part) if sizing.is_bicubic else None
        image = decode_image(file, name, max_pixels, max_bytes, parent.new_pixels, fit)
        return {"image": _facts(image), "shape": image.pixels.shape}
    video = decode_video(
        file,
        name,
        part,
        sizing.fit_video,
        max_pixels,
        max_bytes,
        parent.on_frame,
        parent.new_pixels,
        request["video_decoder"],
        request["num_threads"],
    )
    return {"video": _facts(video), "shape": video.frames.shape}


def _facts(decoded: Decoded) -> Message:
    """All of it but the pixels, which the worker has."""
    facts = {field.name: getattr(decoded, field.name) for field in fields(decoded)}
    facts.pop("pixels" if isinstance(decoded, DecodedImage) else "frames")
    jsonable: Message = to_jsonable_python(facts)
    return jsonable


if __name__ == "__main__":
    _, end, parent = sys.argv
    # Many decode for one engine, and an engine that waits for a core makes all jobs wait.
    os.nice(NICENESS)
    confine(int(parent))
    serve(Channel(socket(fileno=int(end))))
