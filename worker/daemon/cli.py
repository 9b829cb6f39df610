"""The command `keye-worker`. Reads the command line and the settings; everything it does lives elsewhere.

What the base install lacks is imported where it is used, so that its absence is told in a line. The supervisor must
never load torch.
"""

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer
from pydantic import ByteSize, TypeAdapter
from rich.markup import escape

from keye.config.codes import PrecisionSetting
from keye.config.connection import connect
from keye.config.contract import escaped
from keye.config.event import TextGenerated
from keye.config.faults import Fault, InvalidJob, InvalidSettings, JobFailed, QueueUnavailable, install_command
from keye.config.formats import media_type_of
from keye.config.job import Content, GenerationOptions, Sampling, Thinking
from keye.config.settings import Settings
from keye.config.terminal import outlive_output
from keye.producer import shell
from keye.producer.client import Client, build_job
from keye.producer.console import OurConsole
from keye.producer.shell import (
    Also,
    AsJson,
    SchemaFile,
    asked_of,
    command_line,
    list_codes,
    read_schema,
    tell,
    width_of,
)
from keye.producer.transcript import Transcript, end_if_unanswered, tell_answers
from keye.worker.daemon.entry import probe as ask_host
from keye.worker.daemon.exit_codes import ExitCode
from keye.worker.daemon.findings import Finding, Severity, as_message, as_rows, fault, select
from keye.worker.daemon.gpus import WrongGpus, visible_gpus
from keye.worker.demo.local_worker import SMALL_KEYE
from keye.worker.in_process.local_media import LocalMedia
from keye.worker.loading.before_torch import secure_torch
from keye.worker.telemetry.health import HostFolder, judge_host

if TYPE_CHECKING:
    from keye.worker.in_process.analyzer import Analyzer


def read_bytes(text: str) -> int:
    """`24GiB`, `24 GB` or plain bytes."""
    return TypeAdapter(ByteSize).validate_python(text)


app = command_line(
    "keye-worker",
    f"Answers Keye-VL analysis jobs from the queue. Needs: {escape(install_command('worker'))}",
    list_codes([*ExitCode, *(code for code in shell.ExitCode if code >= shell.ExitCode.UNWRITABLE)]),
)

logger = logging.getLogger("keye-worker")

# Wide enough for the rows of `keye-worker bench`, and of `keye-worker plan`.
BENCH_COLUMNS = 120
PLAN_COLUMNS = 80

Gpus = Annotated[
    str | None,
    typer.Option(
        "--gpus",
        help="all, or indices of nvidia-smi, UUIDs and MIG UUIDs joined by commas; instead of CUDA_VISIBLE_DEVICES",
    ),
]


@app.command()
def run(
    gpus: Gpus = None,
    as_json: Annotated[bool, typer.Option("--json", help="log as JSON: KEYE_LOG_FORMAT=json")] = False,
) -> None:
    """Check the set-up, then run one worker process per GPU (or one on the CPU) until SIGTERM."""
    from keye.worker.daemon.endpoint import HostCollector, serving
    from keye.worker.daemon.host_limits import raise_open_files
    from keye.worker.daemon.preflight import check_before_start
    from keye.worker.daemon.supervisor import Supervisor
    from keye.worker.media.decode.sandbox import hide_memory
    from keye.worker.telemetry.log import set_up_log

    if as_json:
        # Workers read it, too.
        os.environ.update(KEYE_LOG_FORMAT="json")
    settings = read_settings()
    set_up_log(settings, "supervisor", logging.INFO)
    outlive_output()
    raise_open_files()
    hide_memory()
    try:
        settings, chosen = _divided(settings, gpus)
    except WrongGpus as error:
        logger.critical("%s", error)
        raise typer.Exit(ExitCode.PREFLIGHT_FAILED) from None
    findings = check_before_start(settings, chosen)
    if warnings := select(findings, Severity.WARNING):
        logger.warning(as_message(warnings))
    if faults := select(findings, Severity.FAULT):
        logger.critical(as_message(faults))
        raise typer.Exit(ExitCode.PREFLIGHT_FAILED)
    # For metrics alone: nobody waits long for a Redis that is away.
    asking = connect(settings.full_redis_url(), timeout_seconds=1, retries=0, key_prefix=settings.key_prefix)
    with closing(HostFolder(settings.run_folder)) as folder, asking as redis:
        supervisor = Supervisor(folder, chosen, settings.drain_seconds, settings.host_workers)
        collector = HostCollector(supervisor.workers, redis)
        with serving(folder, collector, settings.metrics_host, settings.metrics_port):
            raise typer.Exit(supervisor.run())


@app.command()
def probe(
    live: Annotated[bool, typer.Option("--live", help="nothing of this host's hangs (as without options)")] = False,
    ready: Annotated[bool, typer.Option("--ready", help="at least one worker takes jobs")] = False,
    as_json: AsJson = False,
) -> None:
    """Tell in a fifth of a second, without HTTP, whether this host's workers are live or ready: exit code 0 or 1."""
    # The command itself does not come by here, but to say how it is used.
    raise typer.Exit(ask_host(["--live"] * live + ["--ready"] * ready + ["--json"] * as_json))


@app.command()
def status(as_json: AsJson = False) -> None:
    """Print how this host's workers are, then the queues, all workers, and how long the work will take."""
    settings = read_settings()
    here = judge_host(settings.run_folder)
    try:
        with Client(settings) as client:
            fleet = client.status()
    except QueueUnavailable as error:
        raise ended(f"this host: {here.reason}; {error}") from None
    if as_json:
        tell(json.dumps({"host": here._asdict(), "fleet": fleet.model_dump(mode="json")}))
    else:
        tell("\n".join([escaped(f"{'host':<8}{here.reason}"), *fleet.lines()]), hang=8)


@app.command()
def doctor(
    gpus: Gpus = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON, a finding a line")] = False,
) -> None:
    """Examine everything a worker needs, ending with one job through the real engine; a line of cure for each fault.

    Ends with exit code 10 when something would stop a worker.
    """
    findings = []
    for finding in _examine(gpus):
        findings.append(finding)
        if as_json:
            tell(json.dumps(asdict(finding)))
        else:
            OurConsole().print(as_rows(finding))
    if select(findings, Severity.FAULT):
        raise typer.Exit(ExitCode.PREFLIGHT_FAILED)


def _examine(gpus: str | None) -> Iterator[Finding]:
    from keye.worker.daemon.preflight import examine

    try:
        settings, chosen = _divided(Settings.read(), gpus)
    except (InvalidSettings, WrongGpus) as error:
        yield fault("settings", str(error), "Correct them; docs/reference.md tells what each may be.")
    else:
        yield from examine(settings, chosen)


@app.command()
def bench(
    as_json: Annotated[bool, typer.Option("--json", help="print JSON, a measure a line")] = False,
) -> None:
    """Measure images a second, memory, the time of each stage, and whether decoders feed the engine on this machine."""
    settings = read_settings()
    secure_torch(settings.cache_folder)
    from keye.worker.daemon.bench import Disagreement, Measured, run_bench
    from keye.worker.model.load import CheckpointFault
    from keye.worker.model.precision import PrecisionUnavailable

    is_wide = not sys.stdout.isatty() or width_of(sys.stdout) >= BENCH_COLUMNS
    try:
        for line in run_bench(settings, tell=partial(tell, err=True)):
            if as_json:
                if isinstance(line, Measured):
                    tell(json.dumps(line.facts))
            elif is_wide or not line.startswith("|"):
                tell(line, hang=0)
            elif isinstance(line, Measured):
                tell(line.in_words(), hang=2)
    except (ValueError, CheckpointFault, PrecisionUnavailable, Disagreement) as error:
        raise ended(str(error), ExitCode.MODEL_LOAD_FAILED) from None


@app.command()
def plan(
    files: Annotated[list[Path] | None, typer.Argument(help="images and videos of one job, in order")] = None,
    fps: Annotated[float | None, typer.Option(help="frames a second of videos")] = None,
    content: Annotated[
        Content | None, typer.Option(metavar="KIND", help=f"what videos show, instead of fps: {', '.join(Content)}")
    ] = None,
    sampling: Annotated[
        Sampling, typer.Option(metavar="HOW", help=f"which frames of videos are read: {', '.join(Sampling)}")
    ] = Sampling.EVEN,
    start_seconds: Annotated[float | None, typer.Option(help="where videos are read from")] = None,
    end_seconds: Annotated[float | None, typer.Option(help="where they are read to")] = None,
    max_frames: Annotated[int | None, typer.Option(help="most frames of a video")] = None,
    max_pixels: Annotated[int | None, typer.Option(help="most pixels of an image or frame")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="longest answer")] = GenerationOptions().max_new_tokens,
    text_tokens: Annotated[int, typer.Option(min=0, metavar="TOKENS", help="about how long the question is")] = 256,
    visual_tokens: Annotated[int, typer.Option(min=0, metavar="TOKENS", help="of a job without files")] = 0,
    gpu_memory: Annotated[
        int | None,
        typer.Option(parser=read_bytes, metavar="BYTES", help="of a card that is not here: 24GiB, 81559MiB"),
    ] = None,
    precision: Annotated[
        PrecisionSetting | None,
        typer.Option(metavar="PRECISION", help=f"instead of KEYE_PRECISION: {', '.join(get_args(PrecisionSetting))}"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tell what files come to with KEYE_MODEL_PATH, how many such jobs a GPU runs together, and what to lower.

    Runs nothing and reads no weights. The GPU is the one told, else the first here, else the CPU.
    """
    settings = read_settings()
    secure_torch(settings.cache_folder)
    from keye.worker.daemon import capacity, planning

    try:
        if settings.model_path is None:
            raise ValueError("KEYE_MODEL_PATH is not set. Set it to a Keye-VL checkpoint folder.")
        facts = planning.CheckpointFacts.read(settings.model_path)
        card = gpu_memory or capacity.card_bytes(settings.device)
        fitting = capacity.Capacity.of(
            settings.model_path, precision or settings.precision, card, settings.gpu_memory_fraction
        )
        room = (fitting.max_tokens or facts.context) - max_new_tokens - text_tokens
        asked = {"fps": fps, "content": content, "sampling": sampling, "max_frames": max_frames}
        asked |= {"start_seconds": start_seconds, "end_seconds": end_seconds, "max_pixels": max_pixels}
        if files and visual_tokens:
            raise ValueError(f"--visual-tokens {visual_tokens} is for a job without files. Leave it or the files out.")
        if missing := [str(path) for path in files or () if not path.is_file()]:
            raise ValueError(f"no such file: {', '.join(missing)}. Give files of this machine; S3 is not looked at.")
        parts = [planning.part_of(path, **asked) for path in files or ()]
        planned = planning.plan_media(parts, facts, room, settings.min_frames_per_second)
    except InvalidJob as error:
        raise typer.BadParameter(str(error)) from None
    except (OSError, KeyError, ValueError, Fault) as error:
        raise ended(str(error)) from None
    totals = planning.sum_up(planned, facts, room)
    shape = capacity.JobShape(totals["visual_tokens"] if planned else visual_tokens, text_tokens, max_new_tokens)
    lower = partial(planning.max_pixels_for, parts=parts, planned=planned, facts=facts, room=room)
    advice = list(
        capacity.advise(fitting, shape, settings.concurrency or capacity.ENOUGH, lower if planned else lambda _: None)
    )
    if as_json:
        memory = fitting.as_dict() | {"jobs": fitting.num_jobs(shape.num_tokens), "lower": advice}
        tell(json.dumps({"media": [asdict(medium) for medium in planned], **totals, "memory": memory}))
        return
    console = OurConsole()
    if planned and console.width < PLAN_COLUMNS:
        tell("\n".join(planning.as_lines(planned, totals)), hang=2)
    elif planned:
        console.print(planning.as_table(planned, totals))
    console.print(capacity.as_table(fitting, shape, settings.num_slots))
    for line in advice:
        tell(f"- {line}", hang=2)


@app.command()
def ask(
    *,
    media: Annotated[list[str] | None, typer.Argument(help="images and videos in order: files or URIs")] = None,
    prompt: Annotated[str, typer.Argument(help="the question, - for standard input")],
    also: Also = None,
    response_schema: SchemaFile = None,
    thinking: Annotated[
        Thinking, typer.Option(metavar="MODE", help=f"whether it reasons before it answers: {', '.join(Thinking)}")
    ] = Thinking.AUTO,
    max_new_tokens: Annotated[int, typer.Option(help="longest answer")] = GenerationOptions().max_new_tokens,
    as_json: AsJson = False,
) -> None:
    """Answer one question here and now, without a queue, with KEYE_MODEL_PATH or else a small model that comes along.

    A terminal shows the text as it is written, reasoning dimmed; elsewhere the answer alone is printed.
    """
    if Path(prompt).is_file() or (not media and len(prompt.split()) == 1 and media_type_of(prompt)):
        raise typer.BadParameter(f"{prompt} is a file. Give the question behind the media.")
    settings = read_settings()
    if settings.model_path is None:
        tell("KEYE_MODEL_PATH is not set: a small model answers, which knows drawn shapes only.", err=True)
    try:
        fields = {"media": media, **asked_of(prompt, also), "response_schema": read_schema(response_schema)}
        fields |= {"thinking": thinking, "generation": {"max_new_tokens": max_new_tokens}}
        # Before the model, which takes its time.
        job = build_job(fields, LocalMedia(Path()))
        if sys.stderr.isatty():
            tell(escaped(f"Loading {settings.model_path or SMALL_KEYE} ..."), err=True)
        with _load(settings.model_path or SMALL_KEYE) as analyzer:
            asked = analyzer.submit(job)
            is_live = not as_json and sys.stdout.isatty()
            if is_live:
                transcript = Transcript()
                for event in asked.events():
                    if isinstance(event, TextGenerated):
                        tell(transcript.show(event), end="", is_styled=True)
            result = asked.result()
            if is_live:
                tell("")
            if as_json:
                tell(result.model_dump_json(indent=2))
            else:
                tell_answers(result, is_first_told=is_live)
            end_if_unanswered(result)
    except (InvalidJob, JobFailed) as error:
        tell(escaped(str(error)), err=True)
        raise typer.Exit(shell.ExitCode.of(error)) from None


@app.command()
def demo(
    as_json: Annotated[bool, typer.Option("--json", help="print JSON, a job a line")] = False,
) -> None:
    """Run real jobs through a broker, an S3 server and a worker of its own, on the CPU; saves demo.png."""
    from keye.worker.demo.demonstration import run_demo

    raise typer.Exit(run_demo(as_json))


def _load(checkpoint: Path) -> "Analyzer":
    from keye.worker.in_process.analyzer import Analyzer
    from keye.worker.model.load import CheckpointFault

    try:
        return Analyzer(checkpoint)
    except Exception as error:
        logger.critical("The model cannot be served: %s", error, exc_info=not isinstance(error, CheckpointFault))
        raise typer.Exit(ExitCode.MODEL_LOAD_FAILED) from None


def read_settings() -> Settings:
    """The settings, or every fault in them at once and the end."""
    try:
        return Settings.read()
    except InvalidSettings as error:
        raise ended(f"settings: {error}") from None


def ended(why: str, code: ExitCode = ExitCode.PREFLIGHT_FAILED) -> typer.Exit:
    """To be raised; its reason is told."""
    tell(escaped(why), err=True)
    return typer.Exit(code)


def _divided(settings: Settings, asked: str | None) -> tuple[Settings, list[str]]:
    """Settings of each worker, and the GPUs that get one; an operator may count more workers on this host.

    Raises `WrongGpus`.
    """
    gpus = visible_gpus(settings.device, os.environ, asked)
    return Settings.read(host_workers=max(settings.host_workers, len(gpus))), gpus


def main() -> None:
    try:
        app(prog_name="keye-worker")
    except ModuleNotFoundError as missing:
        if (missing.name or "keye").startswith("keye"):
            raise
        tell(f"keye-worker: {missing.name} is not installed. {install_command('worker')}", err=True)
        sys.exit(ExitCode.PREFLIGHT_FAILED)


if __name__ == "__main__":
    main()
