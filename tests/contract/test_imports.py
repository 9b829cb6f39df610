"""Who may import whom: the table of docs/design.md, held as data and checked on the source itself."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# room: the rooms it may import, besides itself; `.*` is all within one. The longest matching prefix of a module's
# name is its room.
ALLOWED: dict[str, set[str]] = {
    "keye.config": set(),
    "keye.producer": {"keye.config"},
    "keye.worker.sizing": {"keye.config"},
    "keye.worker.host_fault": set(),
    "keye.worker.private_folder": {"keye.config"},
    "keye.worker.media": {"keye.config", "keye.worker.host_fault", "keye.worker.sizing"},
    "keye.worker.media.fetch": {
        "keye.config",
        "keye.worker.host_fault",
        "keye.worker.media",
        "keye.worker.private_folder",
        "keye.worker.telemetry",
    },
    "keye.worker.media.frames": {"keye.config", "keye.worker.media", "keye.worker.sizing"},
    "keye.worker.media.decode": {
        "keye.config",
        "keye.worker.host_fault",
        "keye.worker.media",
        "keye.worker.media.frames",
        "keye.worker.sizing",
        "keye.worker.telemetry",
    },
    "keye.worker.media.job_media": {
        "keye.config",
        "keye.worker.media",
        "keye.worker.media.decode",
        "keye.worker.media.fetch",
        "keye.worker.sizing",
    },
    "keye.worker.model": {"keye.config", "keye.worker.sizing"},
    "keye.worker.broker": {"keye.config"},
    "keye.worker.periodic_thread": set(),
    "keye.worker.leases": {"keye.config", "keye.worker.periodic_thread", "keye.worker.telemetry"},
    "keye.worker.telemetry": {"keye.config", "keye.worker.periodic_thread", "keye.worker.private_folder"},
    "keye.worker.results": {
        "keye.config",
        "keye.worker.leases",
        "keye.worker.private_folder",
        "keye.worker.telemetry",
    },
    "keye.worker.engine": {"keye.config", "keye.worker.host_fault", "keye.worker.model", "keye.worker.telemetry"},
    "keye.worker.proof": {"keye.config", "keye.worker.engine", "keye.worker.model"},
    "keye.worker.tasks": {
        "keye.config",
        "keye.worker.broker",
        "keye.worker.engine",
        "keye.worker.host_fault",
        "keye.worker.leases",
        "keye.worker.media",
        "keye.worker.media.*",
        "keye.worker.model",
        "keye.worker.periodic_thread",
        "keye.worker.results",
        "keye.worker.sizing",
        "keye.worker.telemetry",
    },
    "keye.worker.loading": {
        "keye.config",
        "keye.worker.engine",
        "keye.worker.host_fault",
        "keye.worker.leases",
        "keye.worker.media",
        "keye.worker.media.*",
        "keye.worker.model",
        "keye.worker.periodic_thread",
        "keye.worker.private_folder",
        "keye.worker.proof",
        "keye.worker.results",
        "keye.worker.sizing",
        "keye.worker.tasks",
        "keye.worker.telemetry",
    },
    "keye.worker.daemon": {"keye.config", "keye.producer", "keye.worker.*"},
    # The demo plays every part: it draws, submits and works.
    "keye.worker.demo": {"keye.config", "keye.producer", "keye.worker.*"},
}
ALLOWED["keye.worker.in_process"] = ALLOWED["keye.worker.loading"] | {"keye.producer", "keye.worker.loading"}
MAY_IMPORT_TORCH = ("keye.worker.model", "keye.worker.engine", "keye.worker.proof", "keye.worker.daemon.bench")
ENGINE_WITHOUT_TORCH = tuple(
    f"keye.worker.engine.{name}" for name in ("inbox", "sequence", "scheduler", "step_plan", "detokenizer")
)


def modules() -> Iterator[tuple[str, ast.Module]]:
    for top in ("config", "producer", "worker"):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield "keye." + ".".join(parts[:-1] if parts[-1] == "__init__" else parts), ast.parse(path.read_text())


def imports_of(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(module: str) -> str | None:
    rooms = [room for room in ALLOWED if module == room or module.startswith(room + ".")]
    return max(rooms, key=len, default=None)


@pytest.mark.holds(
    "docs/design.md#rooms-and-who-may-import-whom",
    "`tests/contract/test_imports.py` holds this table as data.",
    "room | holds | imports",
)
def test_every_import_is_in_the_table() -> None:
    faults = []
    for name, tree in modules():
        room = room_of(name)
        if room is None:
            assert name == "keye.worker", f"{name} is in no room of the table"
            continue
        for imported in imports_of(tree):
            target = room_of(imported)
            if target and target != room and not any(fnmatch(target, allowed) for allowed in ALLOWED[room]):
                faults.append(f"{name} imports {imported}")
    assert not faults


def test_rooms_import_each_other_in_one_direction() -> None:
    """Of those that do not have all: else one could be read only after the other, and the other after the one."""
    rooms = {room: allowed for room, allowed in ALLOWED.items() if "keye.worker.*" not in allowed}
    TopologicalSorter({a: [b for b in rooms if any(fnmatch(b, c) for c in rooms[a])] for a in rooms}).prepare()


@pytest.mark.holds(
    "docs/design.md#rooms-and-who-may-import-whom",
    "Torch is imported at module level in `worker/model`",
)
def test_torch_is_imported_only_where_tensors_live() -> None:
    faults = []
    for name, tree in modules():
        at_module_level = ast.Module([n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)], [])
        heavy = {i.split(".")[0] for i in imports_of(at_module_level)} & {"torch", "transformers"}
        allowed = name.startswith(MAY_IMPORT_TORCH) and name not in ENGINE_WITHOUT_TORCH
        if heavy and not allowed:
            faults.append(f"{name} imports {', '.join(sorted(heavy))}")
    assert not faults


@pytest.mark.holds(
    "docs/design.md#rooms-and-who-may-import-whom",
    "a producer and the supervising parent never load it",
)
@pytest.mark.parametrize(
    "module", ["keye", "keye.producer.cli", "keye.worker.daemon.cli", "keye.worker.daemon.supervisor"]
)
def test_light_processes_never_load_torch(module: str) -> None:
    """A producer lives in a web backend; a supervisor that touched CUDA would spoil its children's pinning."""
    heavy = "{'torch', 'transformers', 'av', 'numpy'}" if "worker" not in module else "{'torch', 'transformers'}"
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert loaded.stdout.strip() == "[]"


def test_producer_does_not_load_the_worker() -> None:
    code = "import sys, keye.producer.cli; print([m for m in sys.modules if m.startswith('keye.worker')])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert loaded.stdout.strip() == "[]"
