"""Torch is first imported here: it would take code from folders that are not ours."""

import importlib
import os
import tempfile
from contextlib import chdir, suppress
from pathlib import Path

from keye.worker.private_folder import PrivateFolder

_COMPILED = "TORCHINDUCTOR_CACHE_DIR"


def secure_torch(cache_folder: Path) -> None:
    """Imports it. `cache_folder` is where to keep compiled code that has no other place."""
    _choose_compiled_folder(cache_folder)
    _import_torch()


def _import_torch() -> None:
    """NVIDIA's cuSPARSELt looks for the driver by an RUNPATH with an empty part, which is the working directory.

    Whoever can put a libcuda.so.1 there, as an upload, would run code in the worker. A process loads a library once.
    """
    # No user of the host but root writes to the root of all.
    with chdir("/"):
        importlib.import_module("torch")


def _choose_compiled_folder(cache_folder: Path) -> None:
    """Torch runs what it finds in a folder of a name that anybody can tell, and make first, in the temporary one."""
    if os.environ.get(_COMPILED):
        return
    for folder in (Path(tempfile.gettempdir(), f"keye-compiled-{os.geteuid()}"), cache_folder / "compiled"):
        private = PrivateFolder(folder, _COMPILED)
        with suppress(OSError):
            os.close(private.open(make=True))
            os.environ[_COMPILED] = str(private.place)
            return
