"""One decoder child, seen from the worker: gives it a medium, and memory for the pixels, notices how it ends."""

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import partial
from mmap import mmap
from multiprocessing.connection import wait
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter

from keye.config.codes import ErrorCode
from keye.config.faults import Fault
from keye.config.job import ImagePart, VideoPart
from keye.worker.host_fault import HostFault
from keye.worker.media.decode.allowance import MAX_CPU_SECONDS, Allowance
from keye.worker.media.decode.channel import Channel, Message
from keye.worker.media.decode.printed import Printed
from keye.worker.media.decoded import Decoded, DecodedVideo
from keye.worker.media.faults import corrupt, name_medium, too_large
from keye.worker.media.frames.video_plan import is_of_rule
from keye.worker.media.limits import MediaLimits
from keye.worker.sizing import Sizing

_TICK_SECONDS = 0.1
# For a machine under load, to start an interpreter and read libraries from its disk.
_START_SECONDS = 120.0
# To print a traceback and end, once it has hung up.
_END_SECONDS = 5.0
_MAX_REASON = 200

_CHILD = "keye.worker.media.decode.child"

# All a child needs of the environment. The rest holds passwords and keys.
_ENVIRONMENT = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ")
# A pool of threads for linear algebra would keep the sandbox from being entered; arenas waste the address space.
_FRUGAL = {"OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}

# What a child says, as its fields' types have it: it is not believed to send the right ones.
_DECODED: TypeAdapter[Decoded] = TypeAdapter(Decoded, config={"arbitrary_types_allowed": True})

logger = logging.getLogger(__name__)


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


class NotBegun(Exception):
    """The child ended before it began with the medium, which has nothing to do with it."""


@dataclass(eq=False)
class Doubtful(Exception):
    """A medium's child died on it, or had no memory for it: the medium's fault only if that is so again, alone."""

    verdict: Callable[[], Exception]


# So many bytes to memory and a handle of it, or None where there is no room now. Raises `Fault` where there will
# be none.
Allocate = Callable[[int], tuple[mmap, int] | None]


class Decoder:
    """Started by making it, which raises `OSError` where it cannot be; used by one thread at a time.

    `is_free` once it waits for its next medium. `started_at` is of time.monotonic().
    """

    def __init__(self, silence_seconds: float) -> None:
        with ExitStack() as undoing:
            ours, theirs = socket.socketpair()
            undoing.callback(ours.close)
            with theirs:
                ours.settimeout(silence_seconds)
                self._printed = Printed()
                undoing.callback(self._printed.close)
                try:
                    self._process = subprocess.Popen(
                        [sys.executable, "-P", "-m", _CHILD, str(theirs.fileno()), str(os.getpid())],
                        env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ} | _FRUGAL,
                        stdin=subprocess.DEVNULL,
                        stdout=self._printed.theirs,
                        stderr=self._printed.theirs,
                        pass_fds=[theirs.fileno()],
                    )
                finally:
                    os.close(self._printed.theirs)
            undoing.pop_all()
        self._channel = Channel(ours)
        self._allowance = Allowance(self._process.pid)
        self._silence_seconds = silence_seconds
        # A field, since the traceback of an error would keep alive what is in a frame.
        self._memory: mmap | None = None
        self.started_at = time.monotonic()
        self._has_begun = False
        self.is_free = True
        self.num_decoded = 0

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    @property
    def can_go_on(self) -> bool:
        """Whether it waits for its next medium, and may take as much for it as any."""
        return self.is_free and self._allowance.suffices_for_another()

    def fileno(self) -> int:
        """Readable once `has_started` has news."""
        return self._channel.fileno()

    def has_started(self) -> bool:
        """Asked until it says so. Raises `OSError` where it never will."""
        self._printed.keep()
        if not wait([self.fileno()], 0):
            if time.monotonic() > self.started_at + _START_SECONDS:
                raise OSError(f"one has not come up within {_START_SECONDS:g} s")
            return False
        with suppress(EOFError):
            if self._channel.receive() == {"started": True}:
                return True
        self._await_end(lambda: None)
        printed = self._printed.take().strip()
        last_line = printed.rpartition("\n")[2].strip()[:_MAX_REASON]
        raise OSError(f"one ended with status {self._process.poll()} before it came up ({last_line or 'silently'})")

    def kill(self) -> None:
        self._channel.close()
        self._process.kill()
        self._process.wait()
        self._tell_printed()
        self._printed.close()

    def decode(self, order: DecodingOrder, allocate: Allocate, num_threads: int) -> Decoded:
        """Raises `NotBegun`, `Doubtful`, `NoRoom`, `Fault`, `HostFault`, `OSError`, or what `order`'s callables do."""
        self.is_free = self._has_begun = False
        self.num_decoded += 1
        try:
            return self._decode(order, allocate, num_threads)
        except EOFError:
            if not self._has_begun:
                raise NotBegun from None
            verdict = self._verdict_on_death(order)
            # Time is the medium's alone, whoever was decoded beside it.
            raise verdict() if self._process.returncode == -signal.SIGXCPU else Doubtful(verdict) from None
        except TimeoutError:
            raise too_large(
                f"its decoder made no progress for {self._silence_seconds:g} s "
                "(KEYE_DECODE_TIMEOUT_SECONDS). Send a smaller or an undamaged file."
            ) from None
        finally:
            self._memory = None
            if self.is_free:
                self._allowance.end()
            self._tell_printed()

    def _decode(self, order: DecodingOrder, allocate: Allocate, num_threads: int) -> Decoded:
        name = name_medium(order.part.uri)
        request = {
            # Where it came from is not the child's business, and may be a secret.
            "part": order.part.model_copy(update={"uri": "file:"}).model_dump_json(),
            "name": name,
            "max_pixels": order.limits.max_image_pixels,
            "max_bytes": order.limits.max_decoded_bytes,
            "sizing": asdict(order.sizing),
            "video_decoder": order.limits.video_decoder,
            "num_threads": num_threads,
        }
        order.on_begin()
        is_image = isinstance(order.part, ImagePart)
        cpu_seconds = order.limits.max_image_cpu_seconds if is_image else MAX_CPU_SECONDS
        self._allowance.grant(order.limits.max_decoded_bytes, cpu_seconds)
        self._channel.send(request, order.file.fileno())
        give_up_at = time.monotonic() + self._silence_seconds
        while True:
            match self._next_message(order, give_up_at):
                case {"begun": True}:
                    self._has_begun = True
                case {"frame": [done, total]}:
                    order.on_frame(done, total)
                    give_up_at = time.monotonic() + self._silence_seconds
                case {"allocate": int(num_bytes)} if 0 < num_bytes <= order.limits.max_decoded_bytes:
                    self._grant(num_bytes, allocate)
                case {"fault": str(code), "message": str(message), "is_doubtful": bool(is_doubtful)} if code in set(
                    ErrorCode
                ):
                    # Where it had no memory, what it has left of it is no measure for the second try.
                    self.is_free = not is_doubtful
                    verdict = partial(Fault, ErrorCode(code), message)
                    raise Doubtful(verdict) if is_doubtful else verdict()
                case {"host_fault": str(reason)}:
                    self.is_free = True
                    raise HostFault(f"{name}: {reason[:_MAX_REASON]}")
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

    def _next_message(self, order: DecodingOrder, give_up_at: float) -> Message:
        while not wait([self.fileno()], min(_TICK_SECONDS, max(0.0, give_up_at - time.monotonic()))):
            self._printed.keep()
            order.check()
            if self._allowance.is_overdrawn:
                raise self._tell_cpu_time(order)
            if time.monotonic() >= give_up_at:
                raise TimeoutError
        return self._channel.receive()

    def _grant(self, num_bytes: int, allocate: Allocate) -> None:
        try:
            if (allocated := allocate(num_bytes)) is None:
                raise NoRoom(num_bytes)
        except (Fault, HostFault, OSError, NoRoom):
            # The child then drops the medium and waits for another.
            self._channel.send({"granted": False})
            self.is_free = True
            raise
        self._memory, handle = allocated
        del allocated
        try:
            self._channel.send({"granted": True}, handle)
        finally:
            os.close(handle)

    def _pixels(self, shape: list[int]) -> npt.NDArray[np.uint8]:
        if self._memory is None:
            raise RuntimeError("a decoder child says it is done, but never asked for memory")
        return np.frombuffer(self._memory, np.uint8).reshape(shape)

    def _verdict_on_death(self, order: DecodingOrder) -> Callable[[], Exception]:
        """What the medium is told if it was to blame."""
        self._await_end(order.check)
        status = self._process.poll()
        if status is None:
            return partial(RuntimeError, f"a decoder child hung up, and had not ended {_END_SECONDS:g} s later")
        if status >= 0:
            told = "what it printed is in the worker's log"
            return partial(RuntimeError, f"a decoder child ended with status {status}; {told}")
        match -status:
            case signal.SIGXCPU:
                return partial(self._tell_cpu_time, order)
            case signal.SIGKILL:
                reason = "its decoder was killed, most likely for want of memory. Send a smaller one."
                return partial(too_large, reason)
            case number:
                name = signal.Signals(number).name
                return partial(corrupt, f"its decoder crashed on it ({name}). Send an undamaged file.")

    def _tell_cpu_time(self, order: DecodingOrder) -> Fault:
        is_image = isinstance(order.part, ImagePart)
        way = (
            " (KEYE_MAX_IMAGE_CPU_SECONDS). Send it as a plain PNG or JPEG."
            if is_image
            else ". Send a shorter stretch."
        )
        return too_large(f"takes more than {self._allowance.cpu_seconds} s of CPU time to decode{way}")

    def _await_end(self, check: Callable[[], None]) -> None:
        """Of one that has hung up: how it ends tells why, and a kill would hide that."""
        give_up_at = time.monotonic() + _END_SECONDS
        while self.is_alive and time.monotonic() < give_up_at:
            check()
            time.sleep(0.01)

    def _tell_printed(self) -> None:
        if printed := self._printed.take():
            logger.warning("Decoder %d printed:\n%s", self._process.pid, printed)


def _require_rule(video: DecodedVideo, part: VideoPart, sizing: Sizing) -> None:
    """A child is not believed to keep to sizes either: all memory and tokens from here on follow from them."""
    plan = video.plan
    is_whole = video.frames.shape == (len(plan.wanted), *plan.size, 3)
    if not is_whole or not is_of_rule(plan, part, sizing.fit_video, video.original_size):
        raise RuntimeError(
            f"a decoder child says what none should: {video.frames.shape} of {video.original_size} by {plan!r:.200}"
        )
