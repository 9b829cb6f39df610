"""`python -m benchmarks.first_gpu_run`: all that a GPU has to show, in one report (docs/first-gpu-run.md).

Each part runs in a process of its own with a time limit, and whatever becomes of it, the next one runs. Nothing here
imports torch: what the parts do is in `first_gpu_parts.py`.
"""

import argparse
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple, TextIO

SKIPPED = 77
"""The exit code of a part that said why it did not run."""

_LOG_LINES = 40


class Part(NamedTuple):
    """`name` is that of its function in `first_gpu_parts.py`, `question` what it answers."""

    name: str
    seconds: float
    question: str


PARTS = (
    Part("versions", 120, "What runs here?"),
    Part("split_rows", 300, "Does a prompts' call over block tables write every row, with and without splits?"),
    Part("gpu_tests", 900, "Do the tests that need a GPU pass?"),
    Part("sequence_forms", 900, "Which form of attention is fastest for which step?"),
    Part("item_forms", 900, "Which is fastest in the vision tower?"),
    Part("capture", 300, "Are decoding steps captured, and do they write what uncaptured ones do?"),
    Part("out_of_memory", 300, "Do jobs survive memory that runs out?"),
    Part("fault_in_capture", 300, "Does a fault while capturing lead to uncaptured steps?"),
    Part("memory", 1200, "Does the 8B model take the memory that was planned, and how large may a video be?"),
    Part("profile", 900, "Where does the time of a step go?"),
    Part("speed", 2400, "How fast is it? (`python -m benchmarks.gpu`)"),
    Part("int8", 900, "What does int8 cost and save?"),
    Part("int4", 900, "What does int4 cost and save?"),
    Part("busy_threads", 600, "How much slower are steps beside eight busy Python threads?"),
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_gpu_run", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="tiny models, on whatever device there is")
    parser.add_argument("--report", type=Path, default=Path("first-gpu-run.md"), help="where it is written")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], help="these parts, not all")
    asked = parser.parse_args()
    parts = [part for part in PARTS if not asked.only or part.name in asked.only]
    with asked.report.open("w", encoding="utf-8") as file:
        run_parts(parts, asked.tiny, Report(file))


class Report:
    """Markdown, in a file and on the terminal as it comes."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, *lines: str) -> None:
        for line in lines:
            print(line, flush=True)
            print(line, file=self._file, flush=True)


def run_parts(parts: Sequence[Part], is_tiny: bool, report: Report) -> None:
    # Forked from a process that has imported torch, a part starts at once. But CUDA does not survive a fork, and no
    # library promises to ask CUDA nothing as it is imported: what counts starts from nothing.
    context = multiprocessing.get_context("forkserver" if is_tiny else "spawn")
    context.set_forkserver_preload(["benchmarks.first_gpu_parts"])
    report.write("# First run on a GPU", "")
    outcomes = []
    for part in parts:
        report.write(f"## {part.name}", "", part.question, "")
        began = time.monotonic()
        with tempfile.NamedTemporaryFile("r", errors="replace") as log:
            outcome = _run(context, part, is_tiny, log.name, report)
            log_lines = log.read().splitlines()
        if log_lines:
            report.write("", f"Its log, the last {_LOG_LINES} lines at most:", "", "```")
            report.write(*log_lines[-_LOG_LINES:], "```")
        outcomes.append(f"| {part.name} | {outcome} | {time.monotonic() - began:.0f} |")
        report.write("", f"**{part.name} {outcome}**, after {time.monotonic() - began:.0f} s.", "")
    report.write("## Summary", "", "| part | outcome | s |", "|---|---|---|", *outcomes)


def _run(context: multiprocessing.context.BaseContext, part: Part, is_tiny: bool, log: str, report: Report) -> str:
    """Its lines as they come, then how it ended."""
    end = time.monotonic() + part.seconds
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_in_its_own_process, args=(part.name, is_tiny, sender, log))
    try:
        process.start()
    except Exception as error:  # the process it is forked from may have died of its imports
        return f"could not be started: {type(error).__name__}: {error}"
    sender.close()
    try:
        while receiver.poll(max(0.0, end - time.monotonic())):
            report.write(receiver.recv())
        outcome = f"was ended: it took more than {part.seconds:g} s"
    except (EOFError, OSError):
        process.join(max(1.0, end - time.monotonic()))
        code = process.exitcode
        if code is not None and code < 0:
            outcome = f"died of {signal.Signals(-code).name}"
        else:
            outcome = {0: "ran", SKIPPED: "was skipped"}.get(code, "failed")
    finally:
        _end_group(process)
    return outcome


def _in_its_own_process(name: str, is_tiny: bool, sender: Connection, log: str) -> None:
    # What it starts ends with it, and what libraries print, native ones too, goes into its log.
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    from benchmarks.first_gpu_parts import Skipped, run_part

    try:
        for line in run_part(name, is_tiny):
            sender.send(line)
    except Skipped as reason:
        sender.send(f"Skipped: {reason}")
        raise SystemExit(SKIPPED) from None


def _end_group(process: multiprocessing.process.BaseProcess) -> None:
    with suppress(ProcessLookupError):
        assert process.pid is not None
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


if __name__ == "__main__":
    main()
