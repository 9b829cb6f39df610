"""One decoder child, seen from the worker: gives it a medium, and memory for the pixels, notices how it ends."""

import logging
import os
import reprlib
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Hashable
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import partial
from mmap import mmap
from traceback import clear_frames
from typing import BinaryIO, Literal

from keye.config.faults import Fault
from keye.config.job import ImagePart, VideoPart
from keye.config.settings import VideoDecoder
from keye.worker.host_fault import HostFault
from keye.worker.media.decode.allowance import MAX_CPU_SECONDS, Allowance
from keye.worker.media.decode.channel import Message, Nonsense, WorkerChannel
from keye.worker.media.decode.printed import Printed
from keye.worker.media.decode.replies import Progress, read_fault, read_image, read_video
from keye.worker.media.decoded import Decoded
from keye.worker.media.faults import corrupt, name_medium, too_large
from keye.worker.media.limits import MediaLimits
from keye.worker.sizing import Sizing

_TICK_SECONDS = 0.1
# For a machine under load, to start an interpreter and read libraries from its disk.
_START_SECONDS = 120.0
# To print a traceback and end, once it has hung up.
_END_SECONDS = 5.0
_MAX_REASON = 200
# A child holds a handful of files, its medium and its pixels. Only for one that may hold fewer there can be no room.
_FEW_HANDLES = 32

_CHILD = "keye.worker.media.decode.child"
# It imports what we would, whatever a host has each Python run first included. A pool of threads for linear algebra
# would take memory for nothing; decord wants a PATH.
_PROGRAM = """
import importlib, os, site, sys
os.environ |= {"OPENBLAS_NUM_THREADS": "1", "PATH": os.defpath}
_, child, end, parent_pid, decoder, *sys.path = sys.argv
site.execsitecustomize()
importlib.import_module(child).main(int(end), int(parent_pid), decoder)
"""
# Of the environment, which holds passwords and keys, it gets nothing but where a host keeps Python's own libraries.
_ENVIRONMENT = ("LD_LIBRARY_PATH",)

logger = logging.getLogger(__name__)


class NoRoom(Exception):
    """The pixels do not fit beside those of other jobs now."""


@dataclass(frozen=True, slots=True)
class DecodingOrder:
    """A medium to decode, how large it is shown, and whom to tell on the way.

    `on_frame` is told the frames done and in all. `check` is called several times a second; what it raises ends the
    decoding at once, and the child with it. `on_wait` is told what for where no child is free at once or there is no
    room for the pixels, `on_begin` before a child that has started is given the medium; both again where it goes back
    to wait. `content` tells the bytes of the file, as they are now, from any others; None where nothing does.
    """

    part: ImagePart | VideoPart
    file: BinaryIO
    limits: MediaLimits
    sizing: Sizing
    on_frame: Callable[[int, int], None]
    check: Callable[[], None]
    on_wait: Callable[[Literal["decoder", "memory"]], None] = lambda _: None
    on_begin: Callable[[], None] = lambda: None
    content: Callable[[], Hashable] = lambda: None


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

    def __init__(self, silence_seconds: float, video_decoder: VideoDecoder, max_pixel_bytes: int) -> None:
        with ExitStack() as undoing:
            ours, theirs = socket.socketpair()
            undoing.callback(ours.close)
            with theirs:
                told = (_CHILD, theirs.fileno(), os.getpid(), video_decoder)
                # As of any Python that is started here, and what we added to ours.
                folders = filter(None, [*os.environ.get("PYTHONPATH", "").split(os.pathsep), *sys.path])
                self._printed = Printed()
                undoing.callback(self._printed.close)
                try:
                    self._process = subprocess.Popen(
                        [sys.executable, "-I", "-c", _PROGRAM, *map(str, told), *map(os.path.abspath, folders)],
                        # Libraries are looked for in the working directory by some, cuSPARSELt's for one.
                        cwd="/",
                        env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
                        stdin=subprocess.DEVNULL,
                        stdout=self._printed.theirs,
                        stderr=self._printed.theirs,
                        pass_fds=[theirs.fileno()],
                        # Else a Ctrl-C at the terminal would be theirs too.
                        process_group=0,
                    )
                finally:
                    os.close(self._printed.theirs)
            undoing.pop_all()
        self._channel = WorkerChannel(ours)
        self._allowance = Allowance(self._process.pid)
        self._max_pixel_bytes = max_pixel_bytes
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
        with suppress(EOFError, Nonsense):
            message = self._channel.receive(0)
            if message is None and time.monotonic() > self.started_at + _START_SECONDS:
                raise OSError(f"one has not come up within {_START_SECONDS:g} s")
            if message is None:
                return False
            if message == {"started": True}:
                self._allowance.set_ceiling(self._max_pixel_bytes)
                return True
        self._await_end(lambda: None)
        printed = self._printed.take().strip()
        last_line = printed.rpartition("\n")[2].strip()[:_MAX_REASON]
        raise OSError(f"one ended with status {self._process.poll()} before it came up ({last_line or 'silently'})")

    def hang_up(self) -> None:
        """Where many are to end: it returns at once, and `kill` is still to come."""
        self._channel.close()
        self._process.kill()

    def kill(self) -> None:
        self.hang_up()
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
        except Nonsense as nonsense:
            name = name_medium(order.part.uri)
            logger.warning("Decoder %d says what none should of %s: %s", self._process.pid, name, nonsense)
            clear_frames(nonsense.__traceback__)  # they would hold the pixels until a search for cycles
            raise Doubtful(partial(_failed, "says what none should")) from None
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
        if not self._channel.is_silent():
            raise NotBegun  # what it says now is of no medium
        name = name_medium(order.part.uri)
        request = {
            # Where it came from is not the child's business, and may be a secret.
            "part": order.part.model_copy(update={"uri": "file:"}).model_dump_json(),
            "name": name,
            "max_pixels": order.limits.max_image_pixels,
            "max_bytes": order.limits.max_decoded_bytes,
            "sizing": asdict(order.sizing),
            "num_threads": num_threads,
        }
        order.on_begin()
        is_image = isinstance(order.part, ImagePart)
        cpu_seconds = order.limits.max_image_cpu_seconds if is_image else MAX_CPU_SECONDS
        self._allowance.grant(order.limits.max_decoded_bytes, cpu_seconds)
        self._channel.send(request, order.file.fileno())
        given_at = time.monotonic()
        self._look_at = given_at + _TICK_SECONDS
        give_up_at = given_at + self._silence_seconds
        progress = Progress(order.part)
        part, rule = order.part, (order.sizing, order.limits)
        while True:
            match self._next_message(order, give_up_at):
                case {"begun": True} if not self._has_begun:
                    self._has_begun = True
                case {"frame": [int(done), int(total)]}:
                    progress.tell(done, total)
                    order.on_frame(done, total)
                    give_up_at = time.monotonic() + self._silence_seconds
                case {"allocate": int(num_bytes)} if 0 < num_bytes <= order.limits.max_decoded_bytes:
                    self._grant(num_bytes, allocate)
                case {"fault": str(code), "sentence": str(sentence), "is_doubtful": bool(is_doubtful)}:
                    fault = read_fault(code, sentence)
                    # Where it had no memory, what it has left of it is no measure for the second try.
                    self.is_free = not is_doubtful
                    raise Doubtful(partial(Fault, fault.code, fault.message)) if is_doubtful else fault
                case {"unreadable_at": int(offset)} if (reason := _why_unreadable(order.file, offset)) is not None:
                    self.is_free = True
                    raise HostFault(f"{name}: cannot be read: {reason}. Look at its disk or its server.")
                case {"has_no_handle": True} if self._may_hold_few_files():
                    self.is_free = True
                    told = "a handle did not reach its decoder. Raise the limit on open files (ulimit -n)."
                    raise HostFault(f"{name}: {told}")
                case {"image": dict(facts), "shape": list(shape)} if isinstance(part, ImagePart):
                    image = read_image(facts, shape, self._memory, part, *rule)
                    self.is_free = True
                    return image
                case {"video": dict(facts), "shape": list(shape)} if isinstance(part, VideoPart):
                    video = read_video(facts, shape, self._memory, part, *rule)
                    self.is_free = True
                    return video
                case message:
                    raise Nonsense(reprlib.repr(message))

    def _next_message(self, order: DecodingOrder, give_up_at: float) -> Message:
        """However it comes, in drops or in floods: the job is asked after as often."""
        while True:
            now = time.monotonic()
            if now >= self._look_at:
                self._look_at = now + _TICK_SECONDS
                self._printed.keep()
                order.check()
                if self._allowance.is_overdrawn:
                    raise self._tell_cpu_time(order)
            if now >= give_up_at:
                raise TimeoutError
            message = self._channel.receive(min(_TICK_SECONDS, give_up_at - now))
            if message is not None:
                return message

    def _grant(self, num_bytes: int, allocate: Allocate) -> None:
        if self._memory is not None:
            raise Nonsense("that it wants memory again")
        try:
            if (allocated := allocate(num_bytes)) is None:
                raise NoRoom
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

    def _verdict_on_death(self, order: DecodingOrder) -> Callable[[], Exception]:
        """What the medium is told if it was to blame."""
        self._await_end(order.check)
        status = self._process.poll()
        if status is None:
            return partial(_failed, f"hung up, and had not ended {_END_SECONDS:g} s later")
        if status >= 0:
            return partial(_failed, f"ended with status {status}")
        match -status:
            case signal.SIGXCPU:
                return partial(self._tell_cpu_time, order)
            case signal.SIGKILL:
                reason = "its decoder was killed, most likely for want of memory. Send a smaller one."
                return partial(too_large, reason)
            case number:
                name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
                return partial(corrupt, f"its decoder crashed on it ({name}). Send an undamaged file.")

    def _tell_cpu_time(self, order: DecodingOrder) -> Fault:
        is_image = isinstance(order.part, ImagePart)
        setting = " (KEYE_MAX_IMAGE_CPU_SECONDS)" if is_image else ""
        way = "Send it as a plain PNG or JPEG." if is_image else "Send a shorter stretch."
        return too_large(f"takes more than {self._allowance.cpu_seconds} s of CPU time to decode{setting}. {way}")

    def _may_hold_few_files(self) -> bool:
        soft, _ = resource.prlimit(self._process.pid, resource.RLIMIT_NOFILE)
        return soft != resource.RLIM_INFINITY and soft < _FEW_HANDLES

    def _await_end(self, check: Callable[[], None]) -> None:
        """Of one that has hung up: how it ends tells why, and a kill would hide that."""
        give_up_at = time.monotonic() + _END_SECONDS
        while self.is_alive and time.monotonic() < give_up_at:
            check()
            time.sleep(0.01)

    def _tell_printed(self) -> None:
        if printed := self._printed.take():
            logger.warning("Decoder %d printed:\n%s", self._process.pid, printed)


def _failed(how: str) -> Fault:
    """What says or does what no decoder should fails on this medium alone: no fault of ours ends a neighbour's."""
    return corrupt(f"its decoder {how}. Send an undamaged file, or convert it.")


def _why_unreadable(file: BinaryIO, offset: int) -> str | None:
    """None where it can be read there. A child's word for it does not have jobs given back, or make a host sick."""
    try:
        if 0 <= offset <= os.fstat(file.fileno()).st_size:
            os.pread(file.fileno(), 1, offset)
    except OSError as error:
        return str(error)
    return None
