"""One decoder child, seen from the worker: gives it a medium, and memory for the pixels, notices how it ends."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from mmap import mmap
from multiprocessing.connection import wait
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter

from keye.config.codes import ErrorCode
from keye.config.faults import Fault
from keye.config.job import ImagePart, VideoPart
from keye.worker.media.decode.channel import Channel, Message
from keye.worker.media.decode.sandbox import MAX_CPU_SECONDS
from keye.worker.media.decoded import Decoded, DecodedVideo
from keye.worker.media.faults import corrupt, name_medium, too_large
from keye.worker.media.frames.video_plan import is_of_rule
from keye.worker.media.limits import MediaLimits
from keye.worker.sizing import Sizing

_TICK_SECONDS = 0.1
# For a machine under load, to start an interpreter and read libraries from its disk.
_START_SECONDS = 120.0

# All a child needs of the environment. The rest holds passwords and keys.
_ENVIRONMENT = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ")
# A pool of threads for linear algebra would keep the sandbox from being entered; arenas waste the address space.
_FRUGAL = {"OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}

# What a child says, as its fields' types have it: it is not believed to send the right ones.
_DECODED: TypeAdapter[Decoded] = TypeAdapter(Decoded, config={"arbitrary_types_allowed": True})


@dataclass(eq=False)
class NoRoom(Exception):
    """The pixels do not fit beside those of other jobs now."""

    num_bytes: int


@dataclass(frozen=True, slots=True)
class DecodingOrder:
    """A medium to decode, how large it is shown, and whom to tell on the way.

    `on_frame` is told the frames done and in all. `check` is called several times a second; what it raises ends the
    decoding at once, and the child with it. `on_wait` is called where no child is free at once or there is no room for
    the pixels, `on_begin` before a child that has started is given the medium; both again where it goes back to wait.
    """

    part: ImagePart | VideoPart
    file: BinaryIO
    limits: MediaLimits
    sizing: Sizing
    on_frame: Callable[[int, int], None]
    check: Callable[[], None]
    on_wait: Callable[[], None] = lambda: None
    on_begin: Callable[[], None] = lambda: None


# So many bytes to memory and a handle of it, or None where there is no room now. Raises `Fault` where there will
# be none.
Allocate = Callable[[int], tuple[mmap, int] | None]


class Decoder:
    """Started by making it; used by one thread at a time. `is_free` once it waits for its next medium."""

    def __init__(self, silence_seconds: float) -> None:
        ours, theirs = socket.socketpair()
        ours.settimeout(silence_seconds)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "keye.worker.media.decode.child", str(theirs.fileno()), str(os.getpid())],
                env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ} | _FRUGAL,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        self._channel = Channel(ours)
        self._silence_seconds = silence_seconds
        # A field, since the traceback of an error would keep alive what is in a frame.
        self._memory: mmap | None = None
        self._has_started = False
        self.is_free = True
        self.num_decoded = 0

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        self._channel.close()
        self._process.kill()
        self._process.wait()

    def decode(self, order: DecodingOrder, allocate: Allocate, num_threads: int) -> Decoded:
        """Raises `Fault`, `NoRoom`, or what `order`'s callables raise."""
        self.is_free = False
        self.num_decoded += 1
        try:
            return self._decode(order, allocate, num_threads)
        except EOFError:
            raise self._fault_of_death() from None
        except TimeoutError:
            raise too_large(
                f"its decoder made no progress for {self._silence_seconds:g} s "
                "(KEYE_DECODE_TIMEOUT_SECONDS). Send a smaller or an undamaged file."
            ) from None
        finally:
            self._memory = None

    def _decode(self, order: DecodingOrder, allocate: Allocate, num_threads: int) -> Decoded:
        request = {
            # Where it came from is not the child's business, and may be a secret.
            "part": order.part.model_copy(update={"uri": "file:"}).model_dump_json(),
            "name": name_medium(order.part.uri),
            "max_pixels": order.limits.max_image_pixels,
            "max_bytes": order.limits.max_decoded_bytes,
            "sizing": asdict(order.sizing),
            "video_decoder": order.limits.video_decoder,
            "num_threads": num_threads,
        }
        self._await_start(order)
        order.on_begin()
        self._channel.send(request, order.file.fileno())
        give_up_at = time.monotonic() + self._silence_seconds
        while True:
            match self._next_message(order, give_up_at):
                case {"frame": [done, total]}:
                    order.on_frame(done, total)
                    give_up_at = time.monotonic() + self._silence_seconds
                case {"allocate": int(num_bytes)} if 0 < num_bytes <= order.limits.max_decoded_bytes:
                    self._grant(num_bytes, allocate)
                case {"fault": str(code), "message": str(message)} if code in set(ErrorCode):
                    self.is_free = True
                    raise Fault(ErrorCode(code), message)
                case {"image": facts, "shape": shape} if isinstance(order.part, ImagePart):
                    self.is_free = True
                    return _DECODED.validate_python({**facts, "pixels": self._pixels(shape)})
                case {"video": facts, "shape": shape} if isinstance(order.part, VideoPart):
                    video = _DECODED.validate_python({**facts, "frames": self._pixels(shape)})
                    assert isinstance(video, DecodedVideo)
                    _require_rule(video, order.part, order.sizing)
                    self.is_free = True
                    return video
                case message:
                    raise RuntimeError(f"a decoder child says what none should: {message!r:.200}")

    def _await_start(self, order: DecodingOrder) -> None:
        """No medium is to blame for what a start takes."""
        if self._has_started:
            return
        try:
            said = self._next_message(order, time.monotonic() + _START_SECONDS)
        except TimeoutError:
            raise RuntimeError(f"a decoder child has not started within {_START_SECONDS:g} s") from None
        if said != {"started": True}:
            raise RuntimeError(f"a decoder child says what none should: {said!r:.200}")
        self._has_started = True

    def _next_message(self, order: DecodingOrder, give_up_at: float) -> Message:
        while not wait([self._channel.fileno()], min(_TICK_SECONDS, max(0.0, give_up_at - time.monotonic()))):
            order.check()
            if time.monotonic() >= give_up_at:
                raise TimeoutError
        return self._channel.receive()

    def _grant(self, num_bytes: int, allocate: Allocate) -> None:
        try:
            if (allocated := allocate(num_bytes)) is None:
                raise NoRoom(num_bytes)
        except (Fault, NoRoom):
            # The child then drops the medium and waits for another.
            self._channel.send({})
            self.is_free = True
            raise
        self._memory, handle = allocated
        del allocated
        try:
            self._channel.send({}, handle)
        finally:
            os.close(handle)

    def _pixels(self, shape: list[int]) -> npt.NDArray[np.uint8]:
        if self._memory is None:
            raise RuntimeError("a decoder child says it is done, but never asked for memory")
        return np.frombuffer(self._memory, np.uint8).reshape(shape)

    def _fault_of_death(self) -> Exception:
        # Where it only closed its end it still runs; how one that has died died no longer changes.
        self._process.kill()
        status = self._process.wait()
        if status >= 0:
            return RuntimeError(f"a decoder child ended with status {status}; what it printed is in the worker's log")
        match -status:
            case signal.SIGXCPU:
                return too_large(f"takes more than {MAX_CPU_SECONDS} s of CPU time to decode. Send a shorter stretch.")
            case signal.SIGKILL:
                return too_large("its decoder was killed, most likely for want of memory. Send a smaller one.")
            case number:
                name = signal.Signals(number).name
                return corrupt(f"its decoder crashed on it ({name}). Send an undamaged file.")


def _require_rule(video: DecodedVideo, part: VideoPart, sizing: Sizing) -> None:
    """A child is not believed to keep to sizes either: all memory and tokens from here on follow from them."""
    plan = video.plan
    is_whole = video.frames.shape == (len(plan.wanted), *plan.size, 3)
    if not is_whole or not is_of_rule(plan, part, sizing.fit_video, video.original_size):
        raise RuntimeError(
            f"a decoder child says what none should: {video.frames.shape} of {video.original_size} by {plan!r:.200}"
        )
