"""Somebody who may write below a media root changes it, again and again, while a worker reads there."""

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from keye.config.codes import ErrorCode
from keye.config.faults import Fault
from keye.worker.media.fetch.local import open_local
from keye.worker.media.place import place_of

# Enough for dozens of hits on a check that leaves a gap of a microsecond, on a machine that is busy.
ROUNDS, SECONDS = 10_000, 3.0
# Where one processor runs the two in turns, a moment that lasts microseconds is met seldom.
PATIENCE_SECONDS = 120.0

NEIGHBOUR = """
import os, sys
root, secret, link, turn = sys.argv[1], sys.argv[2], os.link, os.replace
os.chdir(root)
print("ready", flush=True)
while True:
    {dance}
"""

DANCES = {
    "a hard link that goes": "link(secret, 'x'); os.unlink('x')",
    "a hard link that goes and comes": "link(secret, 'x'); os.unlink('x'); link(secret, 'x (deleted)'); "
    "os.unlink('x (deleted)')",
    "a hard link that was called as if it were gone": "link(secret, 'x (deleted)'); turn('x (deleted)', 'x'); "
    "os.unlink('x')",
    "a hard link under a file's name": "link(secret, 'x'); os.unlink('x'); open('x', 'w').write('mine'); "
    "os.unlink('x')",
    "a file that is replaced": "link(secret, 'x'); open('y', 'w').write('mine'); turn('y', 'x'); os.unlink('x')",
    "a hard link that is moved": "link(secret, 'd/x'); turn('d/x', 'x'); os.unlink('x')",
    "a symbolic link": "os.symlink(secret, 'x'); os.unlink('x'); open('x', 'w').write('mine'); os.unlink('x')",
    "a folder and a link to another": "open('d/secret', 'w').write('mine'); turn('d', 'e'); "
    "os.symlink(os.path.dirname(secret), 'd'); os.unlink('d'); turn('e', 'd'); os.unlink('d/secret')",
}


@pytest.mark.holds("docs/operations.md#which-media-does-a-worker-read", "So a file of more than one name is refused")
@pytest.mark.parametrize("dance", DANCES)
def test_whatever_a_neighbour_swaps_nothing_from_outside_is_read(tmp_path: Path, dance: str) -> None:
    root, secret = tmp_path / "root", tmp_path / "outside" / "secret"
    (root / "d").mkdir(parents=True)
    secret.parent.mkdir()
    secret.write_bytes(b"SECRET")
    names = [name for name in ("x", "x (deleted)", "d/x", "d/secret") if f"'{name}'" in DANCES[dance]]
    command = [sys.executable, "-c", NEIGHBOUR.format(dance=DANCES[dance]), str(root), str(secret)]
    began, seen = time.monotonic(), Counter[str]()

    def is_enough() -> bool:
        seconds = time.monotonic() - began
        has_met_both = {ErrorCode.MEDIA_NOT_FOUND, ErrorCode.MEDIA_FORBIDDEN} <= seen.keys()
        return (seen.total() >= ROUNDS or seconds >= SECONDS) and (has_met_both or seconds >= PATIENCE_SECONDS)

    with subprocess.Popen(command, stdout=subprocess.PIPE) as neighbour:
        try:
            assert neighbour.stdout is not None
            assert neighbour.stdout.readline() == b"ready\n"
            while not is_enough():
                for name in names:
                    try:
                        with open_local(str(root / name), [root], 100) as file:
                            read = file.read()
                    except Fault as fault:
                        seen[fault.code] += 1
                    else:
                        assert read != b"SECRET"
                        seen["read"] += 1
            assert neighbour.poll() is None
        finally:
            neighbour.kill()
    # Of both kinds of moments some were met.
    assert {ErrorCode.MEDIA_NOT_FOUND, ErrorCode.MEDIA_FORBIDDEN} <= seen.keys(), seen


# What a neighbour does right before the call of this name: each moment that there is, one after another.
MOMENTS = ["fstat", "readlink"]


@pytest.mark.parametrize("before", MOMENTS)
@pytest.mark.parametrize("then", ["nothing", "a link of that name", "a link of the name of what is gone"])
def test_hard_link_that_goes_between_two_looks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, then: str
) -> None:
    root, secret = tmp_path / "root", tmp_path / "secret"
    root.mkdir()
    secret.write_bytes(b"SECRET")
    os.link(secret, root / "x")
    real: Callable[..., object] = getattr(os, before)

    def look(*given: object) -> object:
        with suppress(FileNotFoundError):
            (root / "x").unlink()
            if then != "nothing":
                os.link(secret, root / ("x" if then == "a link of that name" else "x (deleted)"))
        return real(*given)

    monkeypatch.setattr(os, before, look)
    with pytest.raises(Fault, match=r"hard links|deleted|no such file"):
        open_local(str(root / "x"), [root], 100)


def test_file_that_is_called_deleted_is_told_from_none(tmp_path: Path) -> None:
    (tmp_path / "x (deleted)").write_bytes(b"inside")
    with pytest.raises(Fault, match=r"or its name ends in ' \(deleted\)'\. Rename it") as caught:
        open_local(str(tmp_path / "x (deleted)"), [tmp_path], 100)
    assert caught.value.code is ErrorCode.MEDIA_NOT_FOUND


def test_links_say_nothing_of_what_is_outside(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    (outside / "folder").mkdir(parents=True)
    (outside / "file").write_bytes(b"SECRET")
    (outside / "loop").symlink_to("loop")
    root.mkdir()
    told = set()
    for place in ("file", "absent", "absent/below", "file/below", "folder", "folder/", "loop", "x" * 300):
        link = root / "link"
        link.symlink_to(f"{outside}/{place}")
        with pytest.raises(Fault) as caught:
            open_local(str(link), [root], 100)
        told.add((caught.value.code, str(caught.value)))
        link.unlink()
    assert len(told) == 1, told
    assert told.pop()[0] is ErrorCode.MEDIA_FORBIDDEN


def test_links_of_links_end_like_the_kernel_s(tmp_path: Path) -> None:
    (tmp_path / "l0").symlink_to(".")
    for number in range(1, 3000):
        (tmp_path / f"l{number}").symlink_to(f"l{number - 1}/" + "./" * 1000)
    for name in ("l2999", "l2999/absent"):
        with pytest.raises(Fault, match="Too many levels") as caught:
            open_local(str(tmp_path / name), [tmp_path], 100)
        assert caught.value.code is ErrorCode.MEDIA_FORBIDDEN
    with pytest.raises(Fault) as caught:
        open_local(str(tmp_path / "l9/l9/l9/absent"), [tmp_path], 100)
    assert caught.value.code is ErrorCode.MEDIA_NOT_FOUND


# Each was minutes of a processor, for the longest that a message could hold.
@pytest.mark.parametrize("name", ["a/", "./", "/", "a", "%41/", "l/", "é/"])
def test_path_that_no_file_can_have_is_refused_at_once(tmp_path: Path, name: str) -> None:
    (tmp_path / "l").symlink_to(".")
    began = time.process_time()
    for uri in (f"{tmp_path}/" + name * 2_000_000, f"file://{tmp_path}/" + name * 2_000_000):
        with pytest.raises(Fault, match=r"is a path of \d+ characters, the limit is 4096") as caught:
            open_local(uri, [tmp_path], 100)
        assert caught.value.code is ErrorCode.MEDIA_NOT_FOUND
    for uri in (f"{tmp_path}/" + name * (3900 // len(name)), f"{tmp_path}/" + name * (3000 // len(name)) + "b" * 256):
        with pytest.raises(Fault, match=r"there is no such file|Too many levels|no regular file"):
            open_local(uri, [tmp_path], 100)
    assert time.process_time() - began < 1


def test_place_of_what_is_there_and_of_what_is_not(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()
    (tmp_path / "link").symlink_to("folder/../folder")
    (tmp_path / "dangling").symlink_to(f"{tmp_path}/folder/absent")
    ways = {
        "link/file": "folder/file",
        "./link//./file": "folder/file",
        "link/absent/below": "folder/absent/below",
        "dangling/below": "folder/absent/below",
        "folder/file/below": "folder/file/below",
        "link/\0/below": "folder/\0/below",
    }
    assert {way: place_of(f"{tmp_path}/{way}") for way in ways} == {
        way: f"{tmp_path}/{place}" for way, place in ways.items()
    }
    assert place_of("/") == place_of("//./") == "/"
