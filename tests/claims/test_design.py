"""docs/design.md: the map is that of the source, and what it counts up is what there is."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from keye.config.codes import LEGAL_MOVES, JobState
from keye.config.keys import PREFIX
from keye.producer.many import JOBS_PER_ROUND_TRIP
from keye.worker.engine.memory import FIRST_REST
from keye.worker.leases import job_lease
from tests.contract.test_imports import ALLOWED, ENGINE_WITHOUT_TORCH, MAY_IMPORT_TORCH
from tests.support.checkout import ROOT

PAGE = (ROOT / "docs/design.md").read_text()
TEXT = " ".join(PAGE.split())
ROOMS = {
    row[0].strip("` /").removesuffix(".py").replace("/", "."): row[2]
    for row in (
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in PAGE.splitlines() if line.startswith("| `")
    )
}
SHORT = {name.removeprefix("keye.").removeprefix("worker.").removeprefix("media."): name for name in ALLOWED}


@pytest.mark.holds("docs/design.md#rooms-and-who-may-import-whom", "room | holds | imports")
@pytest.mark.holds(
    "docs/design.md#rooms-and-who-may-import-whom", "`tests/contract/test_imports.py` holds this table as data."
)
def test_the_table_of_rooms_is_the_one_that_is_held() -> None:
    assert {f"keye.{room}" for room in ROOMS} == ALLOWED.keys() - {"keye.worker.media.job_media"}
    above: list[str] = []
    for room, told in ROOMS.items():
        allowed = ALLOWED[f"keye.{room}"]
        if told.startswith("everything"):
            assert allowed == {"keye.config", "keye.producer", "keye.worker.*"}
        elif told.startswith("config and all other rooms above but "):
            left_out = {SHORT[name] for name in re.split(r", | and ", told.rpartition(" but ")[2])}
            assert {each for each in allowed if "*" not in each} == {
                each for each in above if not each.startswith("keye.worker.media.")
            } - left_out
            assert "keye.worker.media.*" in allowed
        else:
            named, _, besides = told.partition("; ")
            assert allowed == ({SHORT[name] for name in named.split(", ")} if named != "nothing of ours" else set())
            if besides:
                door = ALLOWED["keye.worker.media.job_media"] - allowed
                assert besides == "`job_media.py`, its front door, fetch and decode too"
                assert door == {f"keye.worker.media{part}" for part in ("", ".fetch", ".decode")}
        above.append(f"keye.{room}")
    assert not [room for room, allowed in ALLOWED.items() if "keye.worker.daemon" in allowed]


@pytest.mark.holds(
    "docs/design.md#rooms-and-who-may-import-whom", "Torch is imported at module level in `worker/model`"
)
@pytest.mark.holds("docs/design.md#rooms-and-who-may-import-whom", "Beside the packages, `benchmarks/` measures")
def test_where_torch_is_and_what_lies_beside_the_packages() -> None:
    assert set(MAY_IMPORT_TORCH) == {
        *("keye.worker.model", "keye.worker.engine", "keye.worker.proof", "keye.worker.daemon.bench")
    }
    assert all(name.startswith("keye.worker.engine.") for name in ENGINE_WITHOUT_TORCH)
    for folder in ("benchmarks", "examples/fastapi_backend", "examples/django_backend", "examples/video_ingestion"):
        assert (ROOT / folder).is_dir()
    assert list(ROOT.glob("examples/**/*.mjs")) or list(ROOT.glob("examples/**/*.js"))
    for file in ("tools/reference.py", "tools/small_keye/train.py", "deploy/systemd", "deploy/kubernetes"):
        assert (ROOT / file).exists()


@pytest.mark.holds(
    "docs/design.md#decisions", "The base install is redis, pydantic", "The worker's needs are an extra."
)
def test_the_base_install_is_as_told() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    *names, last = (Requirement(line).name for line in sorted(project["dependencies"], key=_place))
    assert f"The base install is {', '.join(names)} and {last}." in TEXT
    assert {"celery", "torch"} <= {Requirement(line).name for line in project["optional-dependencies"]["worker"]}


def _place(line: str) -> int:
    return TEXT.index(Requirement(line).name, TEXT.index("The base install is"))


@pytest.mark.holds("docs/design.md#decisions", "and hundreds of jobs share a round trip")
@pytest.mark.holds(
    "docs/design.md#one-job-walked", "the batch is halved and steps stay smaller for a thousand steps and more"
)
def test_numbers_are_those_of_the_code() -> None:
    assert 200 <= JOBS_PER_ROUND_TRIP < 1000
    assert FIRST_REST == 1000


@pytest.mark.holds(
    "docs/design.md#one-job-walked", "States: QUEUED → RUNNING → SUCCEEDED, FAILED, CANCELLED or EXPIRED"
)
@pytest.mark.holds("docs/design.md#one-job-walked", "A queued job may be CANCELLED, or EXPIRED by its deadline")
@pytest.mark.holds("docs/design.md#one-job-walked", "`config/codes.py` has the legal moves")
def test_states_are_those_that_are_legal() -> None:
    final = {JobState(word) for word in ("SUCCEEDED", "FAILED", "CANCELLED", "EXPIRED")}
    assert LEGAL_MOVES[JobState.RUNNING] == final | {JobState.QUEUED}
    assert {JobState.RUNNING, JobState.CANCELLED, JobState.EXPIRED} <= LEGAL_MOVES[JobState.QUEUED]
    assert LEGAL_MOVES.keys() == final | {JobState.QUEUED, JobState.RUNNING}
    assert {state for state in LEGAL_MOVES if state.is_final} == final
    # No key is named anywhere else, in scripts neither.
    sources = [path for room in ("config", "producer", "worker") for path in (ROOT / room).rglob("*.*")]
    keyed = [path for path in sources if path.suffix in (".py", ".lua") and f'"{PREFIX}' in path.read_text()]
    assert {path.name for path in keyed} <= {"keys.py"}


@pytest.mark.holds(
    "docs/design.md#one-job-walked", "Each script that ends a job also writes it into the feed of ended jobs"
)
def test_each_script_that_ends_a_job_writes_the_feed() -> None:
    scripts = {path.stem: path.read_text() for path in (ROOT / "config/scripts").glob("*.lua")}
    end = "finish"
    assert f"function {end}(" in scripts["prelude"]
    ending = {name for name, text in scripts.items() if re.search(rf"\b{end}\(", text)} - {"prelude"}
    assert ending == {"settle", "end_queued"}
    assert "XADD" in scripts["prelude"].partition(f"function {end}")[2]
    # Nobody else writes an outcome.
    outside = {name for name, text in scripts.items() if '"outcome",' in text and "HSET" in text}
    assert outside <= {"prelude", *ending}


@pytest.mark.holds("docs/design.md#one-job-walked", "(Claimed, AlreadySettled, HeldElsewhere, Forgotten or Suspect")
def test_a_claim_has_five_answers() -> None:
    over = job_lease.AlreadySettled | job_lease.HeldElsewhere | job_lease.Forgotten
    assert job_lease.LeaseStore.claim.__annotations__["return"] == job_lease.Claimed | over | job_lease.Suspect


@pytest.mark.holds("docs/design.md#habits", "Settings are read in `config/settings.py` alone, but for a probe's")
@pytest.mark.holds("docs/design.md#habits", "and warnings are errors")
def test_habits_that_can_be_seen_in_the_source() -> None:
    sources = [path for room in ("config", "producer", "worker") for path in (ROOT / room).rglob("*.py")]
    read = re.compile(r"environ(?:\.get|\.pop)?[\[(]\"KEYE_")
    assert {path.relative_to(ROOT) for path in sources if read.search(path.read_text())} == {
        Path("worker/daemon/entry.py")
    }
    filters = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["filterwarnings"]
    assert filters[0] == "error"
