"""Where torch keeps compiled code, which it runs, is nobody else's."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from keye.worker.loading.before_torch import secure_torch
from tests.support import neighbour
from tests.support.neighbour import needs_root


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The temporary folder, as long as the test runs."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    with neighbour.shared_folder() as folder:
        monkeypatch.setattr("tempfile.tempdir", str(folder))
        yield folder


def compiled_folder() -> Path:
    folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert (folder.stat().st_uid, folder.stat().st_mode & 0o777) == (os.geteuid(), 0o700)
    return folder


def test_it_is_the_same_at_each_start(temporary: Path) -> None:
    for _ in range(2):
        secure_torch(temporary / "cache")
        assert compiled_folder() == temporary / f"keye-compiled-{os.geteuid()}"
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = ""


def test_one_that_is_given_is_left(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/given")
    secure_torch(temporary / "cache")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/given"
    assert list(temporary.iterdir()) == []


@needs_root
@pytest.mark.parametrize("script", ["mkdir -m 777 $1", "ln -s / $1", "touch $1"])
def test_one_that_another_user_made_first_is_not_used(temporary: Path, script: str) -> None:
    neighbour.does(script, temporary / f"keye-compiled-{os.geteuid()}")
    secure_torch(temporary / "cache")
    assert compiled_folder() == temporary / "cache" / "compiled"


def test_the_working_folder_is_the_same_afterwards(temporary: Path) -> None:
    before = Path.cwd()
    secure_torch(temporary / "cache")
    assert Path.cwd() == before
