"""A script that both sides run is one script, though neither side may read the other's folder."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_scripts_of_one_name_say_the_same_on_both_sides() -> None:
    ours = {path.name: path.read_text() for path in (ROOT / "producer/scripts").glob("*.lua")}
    theirs = {path.name: path.read_text() for path in (ROOT / "worker/leases/scripts").glob("*.lua")}
    shared = ours.keys() & theirs.keys()
    assert shared
    assert [name for name in sorted(shared) if ours[name] != theirs[name]] == []
