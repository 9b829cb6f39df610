"""constraints.txt: one exact version of everything, for every Python that is supported, and it is what is installed."""

import re
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
LOCK = (ROOT / "constraints.txt").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHONS = ("3.11", "3.12", "3.13")
OURS = canonicalize_name(PROJECT["name"])


def locked(python: str) -> dict[str, str]:
    """Name to version of all that is locked for a Linux machine with this Python."""
    environment = default_environment() | {"python_version": python, "python_full_version": f"{python}.9"}
    pins = [Requirement(line) for line in LOCK.splitlines() if line and not line.startswith("#")]
    chosen = [pin for pin in pins if pin.marker is None or pin.marker.evaluate(environment)]
    versions = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in chosen}
    assert len(versions) == len(chosen), "a package is locked to two versions at once"
    return versions


def asked() -> list[Requirement]:
    """Everything that pyproject.toml names, in whatever extra."""
    lists = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    requirements = [Requirement(text) for each in lists for text in each]
    return [requirement for requirement in requirements if canonicalize_name(requirement.name) != OURS]


@pytest.mark.holds("README.md#see-it-work", "On a machine with Python 3.11 to 3.13")
def test_the_pythons_that_are_promised_are_those_that_are_tried() -> None:
    promised = [kind.rpartition(" :: ")[2] for kind in PROJECT["classifiers"] if re.search(r":: 3\.\d", kind)]
    tried = re.search(r"^PYTHONS := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert tried is not None
    assert tried[1].split() == [f"python{version}" for version in PYTHONS]
    assert promised == list(PYTHONS)


@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_is_locked_within_its_range(python: str) -> None:
    versions = locked(python)
    for requirement in asked():
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), requirement


def test_every_range_has_an_upper_end() -> None:
    for requirement in asked():
        assert any(end.operator in ("<", "==") for end in requirement.specifier), requirement


def test_lock_names_versions_and_no_place_to_fetch_them_from() -> None:
    for line in LOCK.splitlines():
        assert line.startswith("#") or re.fullmatch(r"[\w.-]+==[\w.]+( ; .+)?", line), line


@pytest.mark.holds(
    "docs/operations.md#how-do-i-upgrade-a-fleet",
    "Versions are locked where you install from a checkout",
)
def test_what_is_installed_here_is_what_is_locked() -> None:
    versions = locked(".".join(default_environment()["python_full_version"].split(".")[:2]))
    # A build of the same release may say for which device it is: 2.14.1+cpu.
    installed = {canonicalize_name(found.name): Version(found.version).public for found in distributions()}
    assert {name: installed[name] for name in versions.keys() & installed} == {
        name: versions[name] for name in versions.keys() & installed
    }
    assert {canonicalize_name(requirement.name) for requirement in asked()} <= installed.keys()


@pytest.mark.holds("docs/deploy.md#docker-compose", "The image takes the locked CUDA wheels")
def test_image_is_built_from_the_lock() -> None:
    steps = (ROOT / "Dockerfile").read_text()
    # Of uv itself, then of all that it installs.
    assert re.findall(r"RUN pip install (.*)", steps) == ["--no-cache-dir --constraint constraints.txt uv"]
    assert "UV_CONSTRAINT=constraints.txt UV_BUILD_CONSTRAINT=constraints.txt" in steps
    assert {line.split()[1] for line in steps.splitlines() if line.startswith("FROM")} == {
        *("python:3.12-slim", "uv", "${WHEELS}")
    }
    assert "!constraints.txt" in (ROOT / ".dockerignore").read_text()


@pytest.mark.holds("docs/deploy.md#docker-compose", "Dependencies are a layer of their own")
def test_image_fetches_its_dependencies_before_it_looks_at_the_source() -> None:
    steps = (ROOT / "Dockerfile").read_text()
    assert steps.index("--extra worker") < steps.index("COPY src") < steps.index("--no-deps .")
    sources = {name for line in re.findall(r"COPY (.*) \S+", steps) for name in line.split()}
    kept = set(re.findall(r"^!(.*)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE))
    assert sources == kept
