"""Decoder children that a medium took over, as far as what they say goes: they end their medium's job and no other."""

import os
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from itertools import count, repeat
from pathlib import Path
from typing import Any

import pytest

from keye.config.codes import ErrorCode
from keye.config.faults import Fault
from keye.worker.media.decode.channel import Nonsense, WorkerChannel
from tests.support.decoder_bench import Bench, Pool, handles
from tests.support.decoder_children import children_of

# What a child of ours does until it has its medium, and then does not do.
PRELUDE = """
import json, os, socket, struct, sys, time
end = socket.socket(fileno=int(sys.argv[1]))
def send(body):
    end.sendall(struct.pack("!I", len(body)) + body)
def say(**message):
    send(json.dumps(message).encode())
def hear():
    return socket.recv_fds(end, 2**16, 1)
def own(size):
    say(allocate=size)
    hear()
say(started=True)
hear()
say(begun=True)
"""
EPILOGUE = "\nhear()"

PLAN = (
    "{'wanted': [*range(30)], 'fps': 30, 'size': [96, 160], 'frames_there': 30, 'frames_asked': 30, 'fps_asked': 30,"
    " 'size_asked': [96, 160], 'reasons': []}"
)
VIDEO = (
    f"{{'plan': {PLAN}, 'ticks': [*range(30)], 'tick_seconds': [1, 30], 'original_size': [96, 160],"
    " 'duration_seconds': 1, 'frames_corrupt': 0, 'decoder': 'pyav', 'format': 'MP4',"
    " 'codec': 'h264'}"
)


def shown(lie: str = "pass", shape: str = "[30, 96, 160, 3]") -> str:
    """A whole video, but for the lie."""
    return f"video = {VIDEO}; own(30 * 96 * 160 * 3); {lie}; say(video=video, shape={shape})"


NONSENSE = {
    "begins again and again": "while True: say(begun=True)",
    "does not get on": "while True: say(frame=[1, 30])",
    "gets on for ever": "number = 0\nwhile True: number += 1; say(frame=[number, 10**9])",
    "goes beyond the end": "for number in range(1, 40): say(frame=[number, 30])",
    "goes back": "say(frame=[9, 30]); say(frame=[8, 30])",
    "changes the end": "say(frame=[1, 30]); say(frame=[2, 31])",
    "counts below zero": "say(frame=[-1, -1])",
    "counts in words": "say(frame=['one', 'two'])",
    "wants memory without end": "own(100)\nwhile True: say(allocate=100)",
    "wants all memory": "say(allocate=2**62)",
    "wants no memory": "say(allocate=-1)",
    "an unknown word": "say(hello='worker')",
    "a list": "send(b'[]')",
    "no JSON": "send(b'{')",
    "no UTF-8": r"send(b'{\xff\xfe}')",
    "a message of 4 GB": r"end.sendall(b'\xff' * 4)",
    "a message of a megabyte": "say(fault='x' * 2**20)",
    "a deep message": "send(b'{\"a\":' * 80000 + b'1' + b'}' * 80000)",
    "a deep list within": "send(b'{\"frame\":' + b'[' * 900 + b']' * 900 + b'}')",
    "an endless number": "send(b'{\"allocate\":' + b'9' * 9000 + b'}')",
    "no number": 'send(b\'{"video":{"fps":NaN},"shape":[]}\')',
    "an infinite number": 'send(b\'{"video":{"fps":1e999},"shape":[]}\')',
    "a code of the worker": "say(fault='MEDIA_UNREACHABLE', sentence='s', is_doubtful=False)",
    "a cancelled job": "say(fault='CANCELLED', sentence='s', is_doubtful=True)",
    "a fault of its own": "say(fault='OUT_OF_ORDER', sentence='s', is_doubtful=False)",
    "a disk that is well": "say(unreadable_at=0)",
    "a place that no disk has": "say(unreadable_at=10**30)",
    "a place before the file": "say(unreadable_at=-1)",
    "no handle": "say(has_no_handle=True)",
    "done without memory": f"say(video={VIDEO}, shape=[30, 96, 160, 3])",
    "done with an image": "own(100); say(image={'original_size': [5, 5]}, shape=[5, 5, 3])",
    "other frames": shown(shape="[15, 192, 160, 3]"),
    "frames of no shape": shown(shape="[[]]"),
    "frames of words": shown(shape="['many']"),
    "frames without end": shown(shape="[10**30]"),
    "facts that are none": "own(100); say(video=[], shape=[])",
    "no facts": shown("video.clear()"),
    "a size of words": shown("video['original_size'] = ['a', 'b']"),
    "a size of nothing": shown("video['original_size'] = [0, 160]"),
    "a size without end": shown("video['original_size'] = [10**4000, 1]"),
    "a time that is none": shown("video['ticks'][3] = 'nan'"),
    "no times": shown("video['ticks'] = []"),
    "a time without end": shown("video['ticks'][3] = 10**4000"),
    "a time beyond all": shown("video['ticks'][3] = 2**70"),
    "ticks of no time": shown("video['tick_seconds'] = [0, 30]"),
    "ticks of no seconds": shown("video['tick_seconds'] = [1, 0]"),
    "endless ticks": shown("video['tick_seconds'] = [10**4000, 1]"),
    "infinitely long": shown("video['duration_seconds'] = 'inf'"),
    "no rate": shown("video['plan']['fps'] = 0"),
    "no rate asked": shown("video['plan']['fps_asked'] = 'nan'"),
    "a decoder of its own": shown("video['decoder'] = 'mine'"),
    "counts without end": shown("video['frames_corrupt'] = 10**4000"),
    "a thousand reasons": shown("video['plan']['reasons'] = ['so'] * 1000"),
}


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """Its pool has yet to be started."""
    pool = Pool(1, silence_seconds=2, max_decoded_bytes=2**24)
    yield Bench(pool, tmp_path, children_of(os.getpid()))
    pool.stop()


@pytest.fixture
def take_over(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """So many of the children to come say from their first medium on what the code says."""

    def take_over(code: str, num_children: int = 3) -> None:
        script = tmp_path / "taken_over.py"
        script.write_text(PRELUDE + code + EPILOGUE)
        are_taken_over = iter(repeat(True, num_children))
        start: Any = subprocess.Popen

        def start_another(command: list[str], **options: Any) -> "subprocess.Popen[bytes]":
            end = str(*options["pass_fds"])
            return start([sys.executable, str(script), end] if next(are_taken_over, False) else command, **options)

        monkeypatch.setattr(subprocess, "Popen", start_another)
        bench.pool.start()

    return take_over


def timed(act: Callable[[], object], most_seconds: float) -> Fault:
    began_at = time.monotonic()
    with pytest.raises(Fault) as caught:
        act()
    assert time.monotonic() - began_at < most_seconds
    return caught.value


@pytest.mark.holds(
    "docs/operations.md#what-can-a-broken-or-hostile-file-do",
    "One that crashes or says what none should (`MEDIA_CORRUPT`)",
)
@pytest.mark.parametrize("name", NONSENSE)
def test_what_no_decoder_says_is_the_mediums_fault_once_it_was_said_twice(
    bench: Bench, take_over: Callable[..., None], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    take_over(NONSENSE[name])
    fault = timed(bench.decode_clip, 15)
    assert fault.code is ErrorCode.MEDIA_CORRUPT
    assert fault.message == "clip.mp4: its decoder says what none should. Send an undamaged file, or convert it."
    assert all(line.isprintable() for line in caplog.text.splitlines())
    assert len(caplog.text) < 5000


@pytest.mark.parametrize(
    ("shape", "size"), [("[96, 64, 3]", "[64, 96]"), ("[64, 96, 3]", "[96, 64]"), ("[64, 96, 3]", "[64 * 10**6, 96]")]
)
def test_a_picture_has_the_size_that_is_the_rule_for_it(
    bench: Bench, take_over: Callable[..., None], shape: str, size: str
) -> None:
    take_over(
        f"import math; shape = {shape}; own(math.prod(shape)); say(image={{'original_size': {size}}}, shape=shape)"
    )
    assert timed(lambda: bench.decode(bench.photo), 15).code is ErrorCode.MEDIA_CORRUPT


DRIPS = {
    "half a message": r"end.sendall(b'\0\0\1\0')" + "\nwhile True: end.sendall(b' '); time.sleep(0.3)",
    "a quick drip": r"end.sendall(b'\0\7\0\0')" + "\nwhile True: end.sendall(b' '); time.sleep(0.0001)",
    "half a length": r"end.sendall(b'\0\0')",
    "nothing": "",
    "nothing, and prints": "while True:\n    try: os.write(2, b'\\x1b[31mnoise\\n' * 1000)\n    except OSError: pass",
}


@pytest.mark.parametrize("name", DRIPS)
def test_half_a_message_is_no_news(
    bench: Bench, take_over: Callable[..., None], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    take_over(DRIPS[name], num_children=1)
    fault = timed(bench.decode_clip, 8)
    assert fault.code is ErrorCode.MEDIA_TOO_LARGE
    assert "no progress for 2 s" in fault.message
    assert len(caplog.text) < 100_000
    bench.assert_works()


@pytest.mark.parametrize("name", DRIPS)
def test_a_job_that_is_over_leaves_a_child_that_drips(bench: Bench, take_over: Callable[..., None], name: str) -> None:
    """Its time is over, or its caller cancelled it."""
    take_over(DRIPS[name], num_children=1)
    begun: list[float] = []

    def check() -> None:
        if begun and time.monotonic() > begun[0] + 0.5:
            raise LookupError

    with pytest.raises(LookupError):
        bench.decode_clip(check=check, on_begin=lambda: begun.append(time.monotonic()))
    assert time.monotonic() - begun[0] < 5
    bench.assert_works()


ENDS = {
    "os._exit(0)": "ended with status 0",
    "os._exit(3)": "ended with status 3",
    "os.kill(os.getpid(), 40)": r"crashed on it \(signal 40\)",
    "end.close(); time.sleep(60)": "hung up, and had not ended 5 s later",
}


@pytest.mark.parametrize("code", ENDS)
def test_an_odd_end_is_the_mediums_fault_too(bench: Bench, take_over: Callable[..., None], code: str) -> None:
    take_over(code)
    with pytest.raises(Fault, match=f"its decoder {ENDS[code]}") as caught:
        bench.decode_clip()
    assert caught.value.code is ErrorCode.MEDIA_CORRUPT


def test_a_sentence_is_one_line_that_every_log_and_answer_can_hold(
    bench: Bench, take_over: Callable[..., None]
) -> None:
    say = r"""say(fault="MEDIA_CORRUPT", sentence="\n\ud800\u202e\x1b[2J" * 10000, is_doubtful=False)"""
    take_over(say, num_children=1)
    message = timed(bench.decode_clip, 15).message
    assert message.isprintable()
    assert message.startswith(r"\n\ud800\u202e\x1b[2J")
    assert len(message) == 1000


def test_files_that_are_sent_along_are_closed(bench: Bench, take_over: Callable[..., None]) -> None:
    body = "struct.pack('!I', 2) + b'{}'"
    take_over(f"socket.send_fds(end, [{body}], [os.memfd_create('sent along')] * 200)")
    assert timed(bench.decode_clip, 15).code is ErrorCode.MEDIA_CORRUPT
    assert "sent along" not in str(handles())


def test_what_a_child_says_after_its_answer_is_said_of_no_other_medium(
    bench: Bench, take_over: Callable[..., None]
) -> None:
    body = "json.dumps({'fault': 'MEDIA_CORRUPT', 'sentence': 'broken', 'is_doubtful': False}).encode()"
    take_over(f"body = {body}; end.sendall((struct.pack('!I', len(body)) + body) * 3)", num_children=1)
    assert timed(bench.decode_clip, 15).message == "broken"
    bench.assert_works()


def test_a_child_that_reads_nothing_holds_nobody_up() -> None:
    ours, theirs = socket.socketpair()
    channel, began_at = WorkerChannel(ours), time.monotonic()
    with ours, theirs, pytest.raises(Nonsense):
        deque(channel.send({"granted": True}) for _ in count())
    assert time.monotonic() - began_at < 5
