"""`keye-worker demo`: real jobs through a real broker, worker and S3 server, with answers that can be checked."""

import json
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import boto3
from moto.server import ThreadedMotoServer
from rich.console import Console, ConsoleOptions
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

from keye.config.event import StageStarted
from keye.config.faults import JobFailed
from keye.config.outcome import JobFailure, JobResult
from keye.producer import Client, Job
from keye.producer.console import OurConsole
from keye.producer.shell import tell
from keye.worker.demo.embedded_valkey import EmbeddedValkey
from keye.worker.demo.ending_signals import EndingSignals
from keye.worker.demo.errands import Errand, draw_errands
from keye.worker.demo.local_worker import LocalWorker
from keye.worker.demo.poster import draw_poster

POSTER = Path("demo.png")
# In fewer there is no room for all columns.
TABLE_COLUMNS = 80
# How long a worker with jobs to do may say nothing of any.
QUIET_SECONDS = 60.0
_BUCKET = "demo"


def run_demo(as_json: bool = False) -> int:
    """Run every errand and show how it went; 0 if each ended as expected, else 1, with the worker's log.

    As JSON each job's end is a line on standard output, and all else is on standard error.
    """
    # What has begun is ended once signals are noted only.
    with EndingSignals() as signals, ExitStack() as begun:
        temporary = begun.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        with signals.unwinding():
            return _run_errands(Path(temporary), begun, as_json)


def _run_errands(folder: Path, begun: ExitStack, as_json: bool) -> int:
    console = OurConsole(sys.stderr if as_json else sys.stdout)
    started = time.monotonic()
    broker, endpoint = begun.enter_context(EmbeddedValkey()), begun.enter_context(_s3_server())
    errands = draw_errands(folder, lambda path: _upload(endpoint, path))
    console.print("A Valkey and an S3 server run; starting a worker that loads the small trained Keye ...")
    settings = {"KEYE_MEDIA_ROOTS": str(folder), "KEYE_S3_ENDPOINT_URL": endpoint}
    worker = begun.enter_context(LocalWorker(broker.url, folder / "worker.log", settings))
    client = begun.enter_context(Client(broker.url))
    console.print(f"Worker ready after {time.monotonic() - started:.1f} s. {len(errands)} jobs:")
    board = Board(errands, [client.submit(errand.job) for errand in errands])
    if as_json:
        board.follow(lambda: worker.process.poll() is None)
        for line in board.as_json():
            tell(line)
    else:
        with Live(board, console=console, refresh_per_second=10):
            board.follow(lambda: worker.process.poll() is None)
        if not console.is_terminal:
            console.line()  # Live ends its last line on terminals only
    num_right = sum(board.is_right(i) for i in range(len(errands)))
    if num_right < len(errands):
        console.print((folder / "worker.log").read_text(), style="dim", markup=False, highlight=False)
    _save_poster(board)
    console.print(
        f"{num_right} of {len(errands)} ended as expected, {time.monotonic() - started:.1f} s in all. "
        f"The media with their answers: {POSTER}"
    )
    return 0 if num_right == len(errands) else 1


class Board:
    """The jobs as a table that fills while they run."""

    def __init__(self, errands: list[Errand], jobs: list[Job]) -> None:
        self.errands = errands
        self._jobs = jobs
        self._stages = ["queued"] * len(jobs)
        self.outcomes: list[JobResult | JobFailure | None] = [None] * len(jobs)
        self._heard_at = time.monotonic()

    def follow(self, is_worker_alive: Callable[[], bool]) -> None:
        """Read every job's events until all have ended, the worker has, or nothing has been heard for long."""
        threads = [threading.Thread(target=self._follow, args=(i,), daemon=True) for i in range(len(self._jobs))]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            if not is_worker_alive() or time.monotonic() - self._heard_at > QUIET_SECONDS:
                return
            time.sleep(0.05)

    def _follow(self, i: int) -> None:
        for event in self._jobs[i].events():
            self._heard_at = time.monotonic()
            if isinstance(event, StageStarted):
                self._stages[i] = event.stage.value
        try:
            self.outcomes[i] = self._jobs[i].result(timeout=QUIET_SECONDS)
        except JobFailed as failed:
            self.outcomes[i] = failed.failure

    def is_right(self, i: int) -> bool:
        outcome = self.outcomes[i]
        found = outcome.answer if isinstance(outcome, JobResult) else outcome and outcome.code
        return found == self.errands[i].expected

    def as_json(self) -> Iterator[str]:
        for i, (errand, outcome) in enumerate(zip(self.errands, self.outcomes, strict=True)):
            told = {"medium": errand.label, "question": errand.job.prompt, "is_right": self.is_right(i)}
            yield json.dumps(told | {"outcome": None if outcome is None else outcome.model_dump(mode="json")})

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        is_narrow = options.max_width < TABLE_COLUMNS
        heads = ["medium: question"] if is_narrow else ["medium", "question"]
        table = Table(*(Column(head, overflow="fold") for head in (*heads, "answer, or why there is none")))
        if not is_narrow:
            table.add_column("ms: fetch + decode + generate", width=13)
        table.add_column("right?")
        for i, errand in enumerate(self.errands):
            match self.outcomes[i]:
                case JobResult(answer=text, timings=t):
                    times = " + ".join(f"{1000 * seconds:.0f}" for seconds in (t.fetch, t.decode, t.generate))
                case JobFailure() as failure:
                    text, times = f"{failure.code}: {failure.message}", ""
                case None:
                    text, times = f"{self._stages[i]} ...", ""
            verdict = "" if self.outcomes[i] is None else "✓" if self.is_right(i) else f"✗ {errand.expected}"
            # As Text: a model's answer is not markup.
            medium, question = errand.label, errand.job.prompt or ""
            whole, narrow = (medium, question, text, times, verdict), (f"{medium}: {question}", text, verdict)
            table.add_row(*map(Text, narrow if is_narrow else whole))
        yield table


@contextmanager
def _s3_server() -> Iterator[str]:
    """An S3 server on loopback with an empty bucket; any credentials do."""
    os.environ.update(AWS_ACCESS_KEY_ID="demo", AWS_SECRET_ACCESS_KEY="demo", AWS_DEFAULT_REGION="us-east-1")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        boto3.client("s3", endpoint_url=f"http://{host}:{port}").create_bucket(Bucket=_BUCKET)
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def _upload(endpoint: str, path: Path) -> str:
    boto3.client("s3", endpoint_url=endpoint).upload_file(str(path), _BUCKET, path.name)
    return f"s3://{_BUCKET}/{path.name}"


def _save_poster(board: Board) -> None:
    tiles = []
    for i, (errand, outcome) in enumerate(zip(board.errands, board.outcomes, strict=True)):
        if errand.picture is None or not isinstance(outcome, JobResult):
            continue
        question, answer = errand.job.prompt or "", outcome.answer
        if errand.gloss and board.is_right(i):
            question, answer = (f"(in Chinese) {text}" for text in errand.gloss)
        tiles.append((errand.picture, question, answer, board.is_right(i)))
    draw_poster(tiles).save(POSTER)
