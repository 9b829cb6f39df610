"""The wheel away from the checkout, in a folder where every name is taken: by a user's modules, and by enemies.

A folder's own modules never run in our processes, not even those that are called like one of the standard library; and
no name of ours, but `keye`, is in the way of the user's.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import packages_distributions
from pathlib import Path

import numpy as np
import pytest

from keye.worker.demo.embedded_valkey import EmbeddedValkey
from keye.worker.demo.scenes import draw_image_scene
from tests.support.checkout import ROOT
from tests.support.wheel import install_wheel

# What a build needs, as the Dockerfile copies it.
SOURCE = ("pyproject.toml", "README.md", "LICENSE", "src", "config", "producer", "worker")
# So were our packages called once, and so are many of other people.
NAMESAKES = ("config", "producer", "worker", "settings", "tasks")
SCENE = draw_image_scene(np.random.default_rng(7), size=(224, 224))
QUESTION = next(q for q in SCENE.questions if q.kind == "background" and q.language == "en")
PROGRAM = """
import config, producer, worker, settings, tasks
import sys
import keye
from keye import Client, ImagePart
from keye.testing import MemoryClient

assert MemoryClient(lambda job: "yes").submit(prompt="?").result().answer == "yes"
assert {module.WHOSE for module in (config, producer, worker, settings, tasks)} == {"the user"}
with Client() as client:
    job = client.submit(prompt=sys.argv[1], media=[ImagePart(uri=sys.argv[2])])
    print(job.result(timeout=120).answer)
print(keye.__file__)
"""


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, installed into a folder of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in SOURCE:
        if (ROOT / name).is_dir():
            leave_out = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=leave_out)
        else:
            shutil.copy(ROOT / name, source)
    return install_wheel(source, folder)


@pytest.fixture(scope="module")
def environment(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Of all processes here: a server, a model, and the wheel's packages before those of the checkout."""
    folder = tmp_path_factory.mktemp("kept")
    # OpenCV, where a test has imported it, has an empty part in the path of libraries: the working directory.
    left_out = ("KEYE_", "LD_LIBRARY_PATH")
    with EmbeddedValkey() as server:
        yield {name: value for name, value in os.environ.items() if not name.startswith(left_out)} | {
            "PYTHONPATH": str(packages),
            "OMP_NUM_THREADS": "2",
            "KEYE_DEVICE": "cpu",
            "KEYE_DECODERS": "1",
            "KEYE_REDIS_URL": server.url,
            "KEYE_CACHE_FOLDER": str(folder / "cache"),
            "KEYE_SPOOL_FOLDER": str(folder / "spool"),
        }


DRIVER = """
#include <stdio.h>
__attribute__((constructor)) static void run(void) { fclose(fopen("%s", "w")); }
"""


@pytest.fixture(scope="module")
def hostile(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a picture, a `.env`, a driver, and a module of every name there is, which all say that they ran."""
    folder = tmp_path_factory.mktemp("hostile")
    names = {*sys.stdlib_module_names, *packages_distributions(), *NAMESAKES, "keye", "sitecustomize"}
    for name in filter(str.isidentifier, names):
        _write_enemy(folder / f"{name}.py")
    for name in NAMESAKES:
        (folder / name).mkdir()
        _write_enemy(folder / name / "__init__.py")
    build = ["gcc", "-shared", "-fPIC", "-x", "c", "-o", folder / "libcuda.so.1", "-"]
    subprocess.run(build, input=DRIVER % (folder / "libcuda.so.1.was-run"), text=True, check=True)
    SCENE.image.save(folder / "picture.png")
    (folder / ".env").write_text(
        f"DATABASE_URL=postgres://elsewhere\nKEYE_MODEL_PATH={packages}/keye/worker/demo/checkpoint\n"
        f"KEYE_MEDIA_ROOTS={folder}\n"
    )
    return folder


def _write_enemy(path: Path) -> None:
    # A decoder may not write, and many an error is caught.
    path.write_text("open(__file__ + '.was-run', 'w').close()\nraise SystemExit(f'{__name__} was hijacked')\n")


def run(command: tuple[str | Path, ...], folder: Path, environment: dict[str, str]) -> str:
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=150)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@contextmanager
def started(command: tuple[str | Path, ...], folder: Path, environment: dict[str, str]) -> Iterator[None]:
    """A worker, which has to end well."""
    log = folder / "worker.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield
    finally:
        process.terminate()
        exit_code = process.wait(60)
        print(log.read_text())
    assert exit_code == 0


def test_the_wheel_holds_what_users_run_and_nothing_else(packages: Path) -> None:
    files = {str(path.relative_to(packages)) for path in packages.rglob("*") if path.is_file()}
    (about,) = {name.partition("/")[0] for name in files if ".dist-info/" in name}
    assert {name.partition("/")[0] for name in files} == {"keye", about, "bin"}
    assert {name for name in files if name.startswith("bin/")} == {"bin/keye", "bin/keye-worker"}
    assert f"{about}/licenses/LICENSE" in files
    in_checkout = {
        f"keye/{path.relative_to(ROOT)}"
        for room in ("config", "producer", "worker")
        for path in (ROOT / room).rglob("*")
        if path.suffix in {".py", ".lua", ".css", ".npz", ".png"} or path.parent.name in {"checkpoint", "cases"}
    }
    alone = {"keye/__init__.py", "keye/__main__.py", "keye/py.typed", "keye/testing.py"}
    assert {name for name in files if name.startswith("keye/")} == in_checkout | alone
    assert "keye/worker/demo/checkpoint/model.safetensors" in files
    assert not [name for name in files if {"train", "echo_worker", "evaluate"} & {Path(name).stem}]


def test_commands_run_in_a_folder_full_of_enemies(packages: Path, hostile: Path, environment: dict[str, str]) -> None:
    for command in ("keye", "keye-worker"):
        assert "Usage" in run((packages / "bin" / command, "--help"), hostile, environment)
    assert not list(hostile.rglob("*.was-run"))


def test_a_worker_and_its_decoders_answer_in_a_folder_full_of_enemies(
    packages: Path, hostile: Path, environment: dict[str, str]
) -> None:
    keye = packages / "bin" / "keye"
    with started((packages / "bin" / "keye-worker", "run"), hostile, environment):
        job_id = run((keye, "submit", QUESTION.text, "picture.png"), hostile, environment).strip()
        answer = run((keye, "result", job_id, "--timeout", "120"), hostile, environment).strip()
    assert answer == QUESTION.answer
    assert not list(hostile.rglob("*.was-run"))


def test_a_users_modules_of_our_old_names_are_beside_a_client_and_a_plain_celery_worker(
    packages: Path, hostile: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    for name in NAMESAKES:
        (tmp_path / f"{name}.py").write_text("WHOSE = 'the user'")
    (tmp_path / "ask.py").write_text(PROGRAM)
    environment = environment | {
        "KEYE_REDIS_URL": environment["KEYE_REDIS_URL"].removesuffix("/0") + "/1",
        "KEYE_MODEL_PATH": str(packages / "keye/worker/demo/checkpoint"),
        "KEYE_MEDIA_ROOTS": str(hostile),
    }
    celery = (sys.executable, "-m", "celery", "-A", "keye.worker.tasks.celery_app", "worker", "--pool", "threads")
    ask = (sys.executable, "ask.py", QUESTION.text, hostile / "picture.png")
    with started(celery, tmp_path, environment):
        answer, origin = run(ask, tmp_path, environment).splitlines()
    assert answer == QUESTION.answer
    assert origin == str(packages / "keye" / "__init__.py")
