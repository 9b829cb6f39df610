"""The command `keye-worker`. Reads the command line and the settings; everything it does lives elsewhere."""

import logging
import os

import typer
from pydantic import ValidationError
from redis import Redis

from config.settings import Settings
from config.wire import describe_faults
from worker.daemon.exit_codes import ExitCode
from worker.daemon.gpu_pinning import visible_gpus
from worker.daemon.preflight import Severity, check_before_start, describe
from worker.daemon.supervisor import Supervisor

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Answers Keye-VL analysis jobs from the queue.")

logger = logging.getLogger("keye-worker")


@app.command()
def run() -> None:
    """Check the set-up, then run one worker process per visible GPU (or one on the CPU) until SIGTERM."""
    logging.basicConfig(level=logging.INFO, format="[%(asctime)s: %(levelname)s/supervisor] %(message)s")
    settings = read_settings()
    gpus = visible_gpus(settings.device, os.environ)
    findings = check_before_start(settings, gpus)
    if warnings := [f for f in findings if f.severity is Severity.WARNING]:
        logger.warning(describe(warnings))
    if faults := [f for f in findings if f.severity is Severity.FAULT]:
        logger.critical(describe(faults))
        raise typer.Exit(ExitCode.PREFLIGHT_FAILED)
    with Redis.from_url(settings.redis_url.get_secret_value(), socket_timeout=1, socket_connect_timeout=1) as redis:
        supervisor = Supervisor(redis, gpus, concurrency=settings.concurrency, drain_seconds=settings.drain_seconds)
        raise typer.Exit(supervisor.run())


def read_settings() -> Settings:
    """The settings, or every fault in them at once and the end."""
    try:
        return Settings()
    except ValidationError as error:
        logger.critical("KEYE_* settings: %s", describe_faults(error))
        raise typer.Exit(ExitCode.PREFLIGHT_FAILED) from None
