"""What a decoder child may not do, tried in processes of their own by code that took one over."""

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageCms

from keye.config.job import ImagePart
from keye.config.settings import Settings
from keye.worker.media.decode import sandbox
from keye.worker.media.job_media import DecodedImage, DecoderPool, MediaCache, MediaLimits, decode, fetch
from keye.worker.sizing import Sizing
from tests.support.checkout import ROOT
from tests.support.compromised_decoder import PROGRAM, assert_harmless

SRGB, LAB = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
# Reads Python where only root may, and has no other right than any user.
AS_ANOTHER = (
    *("setpriv", "--reuid=4321", "--regid=4321", "--clear-groups"),
    *("--inh-caps=+dac_override", "--ambient-caps=+dac_override"),
)
# What Landlock refuses by itself, where a kernel has no filter for system calls.
OF_PATHS_AND_OTHERS = {
    *("read the worker's environment", "read and write the worker's memory", "take the worker's connection"),
    *("read a file", "list a folder", "change a file in place", "write to a file", "make a file", "truncate a file"),
    *("delete a file", "rename a file", "link a file", "make a symbolic link", "make a folder", "run a program"),
    *("start a program", "kill the worker", "kill a sibling", "trace a sibling"),
}


def take_over(*left_out: str, user: Sequence[str] = ()) -> dict[str, Any]:
    environ = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    ran = subprocess.run([*user, *PROGRAM, *left_out], env=environ, capture_output=True, text=True, cwd="/")
    assert ran.returncode == 0, ran.stderr
    came_of_it: dict[str, Any] = json.loads(ran.stdout)
    return came_of_it


@pytest.mark.holds("docs/design.md#decisions", "meets a decoder in a process that the kernel leaves nothing but")
@pytest.mark.holds(
    "docs/operations.md#what-can-a-broken-or-hostile-file-do",
    "could do nothing but decode wrongly",
    "it opens no file, makes no socket, runs no program, starts no process, reaches none, raises no limit",
    "That holds for any user, root too",
)
@pytest.mark.parametrize("user", [(), AS_ANOTHER], ids=["as we are", "as another user"])
def test_code_that_takes_a_decoder_over_can_do_nothing_but_decode(user: Sequence[str]) -> None:
    if user and os.geteuid():
        pytest.skip("to be another user wants root")
    assert_harmless(take_over(user=user))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBX", "RGBA", "CMYK", "YCbCr", "LAB"])
def test_all_that_colours_need_is_there_before_a_decoder_is_confined(
    mode: str, decoders: DecoderPool, tmp_path: Path
) -> None:
    path, limits = tmp_path / "white.tif", MediaLimits.of(Settings(media_roots=(tmp_path,)))
    white = Image.new("RGB", (56, 56), "white")
    lab = ImageCms.applyTransform(white, ImageCms.buildTransform(SRGB, LAB, "RGB", "LAB"))
    (lab if mode == "LAB" else white.convert(mode)).save(path)
    parts = [ImagePart(uri=str(path))]
    fetched = fetch(parts, limits, MediaCache(tmp_path / "cache", 2**20))
    (decoded,) = decode(parts, fetched, limits, Sizing(factor=28, min_pixels=28**2, max_pixels=56**2), decoders)
    assert isinstance(decoded, DecodedImage)
    assert (decoded.pixels > 252).all()


def test_seccomp_alone_suffices() -> None:
    assert_harmless(take_over("_refuse_paths"))


def test_where_the_workers_own_filter_knows_no_seccomp_call_children_are_confined_all_the_same() -> None:
    """As under systemd's @system-service."""
    assert_harmless(take_over("_SECCOMP"))


def test_landlock_alone_keeps_a_decoder_from_files_and_from_other_processes() -> None:
    if sandbox._landlock_version() < 6:
        pytest.skip("this kernel's Landlock knows no scopes: signals of a child would arrive")
    acts = take_over("_refuse_calls")["acts"]
    assert {act: acts[act] for act in OF_PATHS_AND_OTHERS if not acts[act].startswith("refused")} == {}


def test_numbers_of_system_calls_are_those_of_each_machine() -> None:
    """By another's table: libseccomp's, which comes with runc."""
    try:
        library = ctypes.CDLL("libseccomp.so.2")
    except OSError:
        pytest.skip("libseccomp is not installed")
    resolve = library.seccomp_syscall_resolve_name_arch
    named = {f"_{name.upper()}": numbers for name, numbers in sandbox._ALLOWED.items()}
    looked_at = ("_CLONE", "_CLONE3", "_TGKILL", "_PRCTL", "_FCNTL", "_SECCOMP")
    named |= {name: getattr(sandbox, name) for name in looked_at}
    for machine, column in sandbox._MACHINES.values():
        for name, numbers in named.items():
            found = resolve(ctypes.c_uint32(machine), name[1:].lower().encode())
            # Below zero where the machine has no such call.
            assert numbers[column] == (found if found >= 0 else None), (name, hex(machine))
    assert resolve(ctypes.c_uint32(sandbox._MACHINES["aarch64"][0]), b"landlock_restrict_self") == 446


def test_decoding_modules_import_no_torch() -> None:
    code = "import sys, keye.worker.media.decode.child; print({'torch', 'transformers'} & set(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "set()"
