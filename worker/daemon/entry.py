"""Where `keye-worker` begins. A probe is asked every few seconds and has no time for what the other commands import."""

import os
import sys
from contextlib import suppress
from pathlib import Path

from keye.config.terminal import end_at_ctrl_c, guard_terminal

RUN_FOLDER = "/var/tmp/keye-run"


def main() -> None:
    end_at_ctrl_c()
    match sys.argv[1:]:
        case ["probe", *options] if not {"--help", "-h"}.intersection(options):
            sys.exit(probe(options))
        case _:
            from keye.worker.daemon.cli import main as every_command

            every_command()


def probe(options: list[str]) -> int:
    """`--live` (without options, too) or `--ready`, and `--json`: 0 or 1, and why; 2 for a wrong option."""
    from keye.worker.telemetry.health import judge_host

    guard_terminal()
    asked = [option for option in options if option != "--json"]
    if len(asked) > 1 or not {*asked} <= {"--live", "--ready"}:
        print(f"keye-worker probe: {' '.join(asked)} is not --live or --ready.", file=sys.stderr)
        return 2
    verdict = judge_host(Path(_run_folder()))
    what, is_so = ("ready", verdict.is_ready) if asked == ["--ready"] else ("live", verdict.is_live)
    if asked == options:
        print(f"{what if is_so else f'not {what}'}: {verdict.reason}", flush=True)
    else:
        import json

        print(json.dumps(verdict._asdict()), flush=True)
    return 0 if is_so else 1


def _run_folder() -> str:
    """As `keye.config.settings` finds it, which takes too long to import."""
    written = os.environ.get("KEYE_RUN_FOLDER")
    if not written:
        from keye.config.env_file import env_file

        # One that cannot be read has kept the worker from starting.
        with suppress(OSError):
            if file := env_file():
                from dotenv import dotenv_values

                written = dotenv_values(file).get("KEYE_RUN_FOLDER")
    return os.path.expanduser(written if written and written.strip() else RUN_FOLDER)


if __name__ == "__main__":
    main()
