"""The base install: all that a producer needs, and from the worker's commands a line that says what to install."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, packages_distributions, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from keye.worker.daemon.exit_codes import ExitCode

# Python imports it by itself, before anything else.
HIDE = """
import json, os, sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

HIDDEN = set(json.loads(os.environ["HIDDEN"]))
sys.meta_path.insert(0, Hidden())
"""
INSTALL = "pip install 'keye-worker[worker]'"


def installed_with(name: str) -> Iterator[str]:
    """The package and what it asks for without extras, all the way down."""
    yield canonicalize_name(name)
    try:
        requirements = [Requirement(line) for line in requires(name) or ()]
    except PackageNotFoundError:
        return
    for requirement in requirements:
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield from installed_with(requirement.name)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which every package is as if not installed that the base install does not bring."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "sitecustomize.py").write_text(HIDE)
    brought = set(installed_with("keye-worker"))
    hidden = [
        module
        for module, distributions in packages_distributions().items()
        if brought.isdisjoint(map(canonicalize_name, distributions))
    ]
    assert {"torch", "celery", "kombu", "av", "numpy", "PIL", "boto3"} <= set(hidden)
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HIDDEN": json.dumps(hidden), "COLUMNS": "120"}


def run(base: dict[str, str], *command: str) -> tuple[int, str, str]:
    done = subprocess.run([sys.executable, *command], env=base, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("command", ["run", "doctor", "bench", "demo", "plan", "ask"])
def test_worker_s_commands_say_what_to_install(base: dict[str, str], command: str, tmp_path: Path) -> None:
    files = {"plan": [str(tmp_path / "x.mp4")], "ask": ["What?"]}.get(command, [])
    code, _, line = run(base | {"KEYE_MODEL_PATH": "/models"}, "-m", "keye.worker.daemon.cli", command, *files)
    assert (code, line.count("\n")) == (ExitCode.PREFLIGHT_FAILED, 1)
    assert line.startswith("keye-worker: ")
    assert line.endswith(f" is not installed. {INSTALL}\n")


def test_keye_plan_says_it_too(base: dict[str, str]) -> None:
    code, _, line = run(base, "-c", "import keye.producer.cli as c; c.app()", "plan", "x.mp4")
    assert code == ExitCode.PREFLIGHT_FAILED
    assert line.endswith(f" is not installed. {INSTALL}\n")


@pytest.mark.parametrize("module", ["keye.producer.cli", "keye.worker.daemon.cli"])
@pytest.mark.parametrize("options", [["--version"], ["-h"], ["--help"], []])
def test_both_commands_tell_their_version_and_their_use(base: dict[str, str], module: str, options: list[str]) -> None:
    code, text, errors = run(base, "-c", f"import {module} as c; c.app()", *options)
    assert errors == ""
    if options == ["--version"]:
        assert (code, text) == (0, f"keye-worker {version('keye-worker')}\n")
    else:
        assert "Usage: " in text
        # The bare command is an unfinished one to click.
        assert code == (0 if options else 2)
    if "daemon" in module and options != ["--version"]:
        assert INSTALL in " ".join(text.split())


@pytest.mark.parametrize("command", ["keye submit", "keye dead list", "keye verify", "keye-worker run"])
def test_short_help_is_that_of_every_command(base: dict[str, str], command: str) -> None:
    program, *words = command.split()
    module = {"keye": "keye.producer.cli", "keye-worker": "keye.worker.daemon.cli"}[program]
    code, text, _ = run(base, "-c", f"import {module} as c; c.app()", *words, "-h")
    assert (code, "Usage: " in text) == (0, True)


def test_the_analyzer_says_what_to_install(base: dict[str, str]) -> None:
    code, _, said = run(base, "-c", "from keye import Analyzer")
    assert code == 1
    assert said.endswith(f" is not installed: {INSTALL}\n")


@pytest.mark.holds("docs/producers.md#from-python", "`pip install .` in a checkout is enough on the asking side")
def test_client_and_version_are_there(base: dict[str, str]) -> None:
    code = "import keye; keye.Client('redis://127.0.0.1:9/0'); print(keye.__version__)"
    assert run(base, "-c", code) == (0, f"{version('keye-worker')}\n", "")
