"""A batch that is run in a process of its own, which dies where it is told to: at a step outwards or in a line of code.

Steps outwards are writes and syncs of files, commits of the journal and jobs that are sent; of a write and of jobs that
are sent together half may be done.
"""

import os
import signal
import sqlite3
import sys
import threading
from collections import Counter
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from types import FrameType
from typing import Any

from keye.producer import Client
from keye.producer.batch import batch, ends, questions
from keye.producer.transport import Transport

_forking = get_context("forkserver")
_forking.set_forkserver_preload(["tests.integration.batch.mortal", "keye.producer.batch.opening"])


def run(url: str, folder: Path, *, step: int = 0, died_at: Path | None = None, **options: Any) -> int:
    """Goes on with the batch `in.jsonl` of the folder; how the process ended.

    It dies before the `step`-th step outwards, and before a line of code of which the file `died_at` says nothing yet,
    which is noted there.
    """
    process = _forking.Process(target=_run, args=(url, folder, step, died_at, options))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _run(url: str, folder: Path, step: int, died_at: Path | None, options: dict[str, Any]) -> None:
    steps = Counter[str]()

    def come_to(what: str) -> bool:
        steps[what] += 1
        return steps.total() == step

    _die_in(come_to)
    if died_at is not None:
        trace = _tracing(set(died_at.read_text().split()), died_at)
        threading.settrace(trace)
        sys.settrace(trace)
    # So that a few lines are many rounds.
    batch.LINES_AT_A_TIME = questions.LINES_AT_A_TIME = 6
    ends.FIRST_LOOK_SECONDS = 0.05
    with Client(url) as client:
        client.submit_batch(folder / "in.jsonl", folder / "out.jsonl", max_in_flight=8, **options).wait()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _die_in(come_to: Callable[[str], bool]) -> None:
    """`come_to` says of each step whether it is the one."""
    write, fsync, submit_many, connect = os.write, os.fsync, Transport.submit_many, sqlite3.connect

    def dying_write(descriptor: int, text: Any) -> int:
        if come_to("write"):
            _die()
        if come_to("half a write"):
            write(descriptor, text[: len(text) // 2])
            _die()
        return write(descriptor, text)

    def dying_fsync(descriptor: int) -> None:
        if come_to("sync"):
            _die()
        fsync(descriptor)

    def dying_submit(self: Transport, jobs: Any, *rest: Any) -> Any:
        if come_to("send"):
            _die()
        if come_to("half sent"):
            submit_many(self, jobs[: len(jobs) // 2], *rest)
            _die()
        answers = submit_many(self, jobs, *rest)
        if come_to("sent, and nobody heard the reply"):
            _die()
        return answers

    class Dying(sqlite3.Connection):
        def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:  # type: ignore[override]
            if statement == "commit" and come_to("commit"):
                _die()
            done = super().execute(statement, *values)
            if statement == "commit" and come_to("committed"):
                _die()
            return done

    os.write, os.fsync = dying_write, dying_fsync
    Transport.submit_many = dying_submit  # type: ignore[method-assign]
    sqlite3.connect = lambda *given, **named: connect(*given, factory=Dying, **named)


def _tracing(places: set[str], died_at: Path) -> Callable[[FrameType, str, Any], Any]:
    code = str(Path(batch.__file__).parent)

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        name = frame.f_code.co_filename
        if not name.startswith(code):
            return None
        if event == "line" and (place := f"{os.path.basename(name)}:{frame.f_lineno}") not in places:
            with died_at.open("a") as file:
                file.write(f"{place}\n")
            _die()
        return trace

    return trace
