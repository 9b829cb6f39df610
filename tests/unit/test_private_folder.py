"""What another user of the host does before us leads nobody elsewhere, and what is refused says why."""

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from keye.worker.private_folder import PrivateFolder
from tests.support import neighbour
from tests.support.neighbour import needs_root


@pytest.fixture
def shared() -> Iterator[Path]:
    with neighbour.shared_folder() as folder:
        yield folder


def opened(path: Path) -> Path:
    """Where it really is, made if need be."""
    handle = PrivateFolder(path, "KEYE_CACHE_FOLDER").open(make=True)
    try:
        found = os.fstat(handle)
        assert (found.st_uid, stat.S_IMODE(found.st_mode) & 0o022) == (os.geteuid(), 0)
        return Path(f"/proc/self/fd/{handle}").readlink()
    finally:
        os.close(handle)


def test_it_is_made_for_this_user_alone_whatever_the_umask(shared: Path) -> None:
    before = os.umask(0)
    try:
        assert opened(shared / "way" / "folder") == shared / "way" / "folder"
    finally:
        os.umask(before)
    assert stat.S_IMODE((shared / "way").stat().st_mode) == 0o755
    assert stat.S_IMODE((shared / "way" / "folder").stat().st_mode) == 0o700


@needs_root
@pytest.mark.parametrize(
    ("script", "below", "reason"),
    [
        pytest.param("mkdir -m 777 $1", "", "belongs to another user", id="folder"),
        pytest.param("mkdir -m 777 $1", "deep/er", "belongs to another user", id="folder-on-the-way"),
        pytest.param("ln -s $2 $1", "", "is a link of another user's", id="link-to-ours"),
        pytest.param("ln -s $2 $1", "deep/er", "is a link of another user's", id="link-on-the-way"),
        pytest.param("ln -s /root $1", "", "is a link of another user's", id="link-to-where-they-may-not-look"),
        pytest.param("mkfifo $1", "", "is no folder", id="pipe"),
        pytest.param("touch $1", "deep/er", "is no folder", id="file-on-the-way"),
    ],
)
def test_what_another_user_has_put_there_is_refused(shared: Path, script: str, below: str, reason: str) -> None:
    ours = shared / "ours"
    ours.mkdir(mode=0o700)
    neighbour.does(script, shared / "folder", ours)
    private = PrivateFolder(shared / "folder" / below, "KEYE_CACHE_FOLDER")
    with pytest.raises(OSError, match=reason):
        private.open(make=True)
    with pytest.raises(OSError, match=reason):
        private.examine()
    assert list(ours.iterdir()) == []


@pytest.mark.parametrize("target", ["{}/real", "real", "../{}/real", "./real/../real"])
def test_links_of_this_user_are_followed(shared: Path, target: str) -> None:
    (shared / "real").mkdir()
    (shared / "link").symlink_to(target.format(shared if target.startswith("{") else shared.name))
    assert opened(shared / "link") == shared / "real"
    assert opened(shared / "link" / "folder") == shared / "real" / "folder"


def test_links_without_end_are_not_followed(shared: Path) -> None:
    (shared / "link").symlink_to("link")
    with pytest.raises(OSError, match="Too many levels"):
        opened(shared / "link")


@needs_root
def test_link_of_ours_that_others_may_have_moved_there_is_refused(shared: Path) -> None:
    precious = shared / "precious"
    precious.mkdir()
    (shared / "open").mkdir()
    (shared / "open").chmod(0o777)
    (shared / "open" / "link").symlink_to(precious)
    neighbour.does("mv $1/link $1/folder", shared / "open")
    with pytest.raises(PermissionError, match="in a folder that others may write"):
        opened(shared / "open" / "folder")


def test_folder_of_ours_that_others_may_write_has_one_of_ours_in_it_and_is_told_of_once(
    shared: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (shared / "folder").mkdir()
    (shared / "folder").chmod(0o777)
    private = PrivateFolder(shared / "folder", "KEYE_CACHE_FOLDER")
    for _ in range(3):
        os.close(private.open(make=True))
    assert private.place == shared / "folder" / f"keye-{os.geteuid()}"
    assert stat.S_IMODE(private.place.stat().st_mode) == 0o700
    (told,) = caplog.messages
    assert "may be written by others (mode 777)" in told
    assert "chmod go-w" in told
    assert stat.S_IMODE((shared / "folder").stat().st_mode) == 0o777, "it may be shared on purpose"


def test_sticky_folder_has_one_of_ours_in_it_and_keeps_its_mode(shared: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Root that is told to use /tmp must not close it to all others."""
    assert opened(shared) == shared / f"keye-{os.geteuid()}"
    assert stat.S_IMODE(shared.stat().st_mode) == 0o1777
    assert caplog.messages == []


@needs_root
@pytest.mark.parametrize("mode", [0o777, 0o2777, 0o2770, 0o2775, 0o1777])
def test_volume_of_roots_has_one_of_the_workers_in_it(shared: Path, mode: int) -> None:
    """As Kubernetes mounts them, by fsGroup or open to all."""
    volume = shared / "volume"
    volume.mkdir()
    os.chown(volume, 0, 999)
    volume.chmod(mode)
    imports = "from pathlib import Path\nfrom keye.worker.private_folder import PrivateFolder"
    code = """
private = PrivateFolder(Path(sys.argv[1]), "KEYE_CACHE_FOLDER")
for _ in range(2):
    handle = private.open(make=True)
    print(private.place, oct(os.fstat(handle).st_mode & 0o777), os.fstat(handle).st_uid)
"""
    assert neighbour.python_as(999, imports, code, volume) == f"{volume}/keye-999 0o700 999\n" * 2


@needs_root
def test_ours_in_an_open_folder_that_another_has_made_first_is_refused(shared: Path) -> None:
    neighbour.does(f"mkdir -m 777 $1/keye-{os.geteuid()}", shared)
    with pytest.raises(PermissionError, match="belongs to another user"):
        opened(shared)


@needs_root
def test_what_is_held_stays_ours_when_others_move_it_and_is_made_again_when_it_is_gone(
    shared: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (shared / "open").mkdir()
    (shared / "open").chmod(0o777)
    private = PrivateFolder(shared / "open" / "folder", "KEYE_CACHE_FOLDER")
    held = private.hold()
    (held / "file").write_bytes(b"ours")
    neighbour.does("mv $1/folder $1/moved; mkdir $1/folder", shared / "open")
    assert (held / "file").read_bytes() == b"ours"
    for _ in range(3):
        assert private.hold() == held
    assert ["was moved away, and is used where it is" in line for line in caplog.messages] == [False, True]
    (held / "other").write_bytes(b"ours too")
    assert list((shared / "open" / "folder").iterdir()) == []
    shutil.rmtree(shared / "open" / "folder")
    assert private.hold() == held
    assert list(held.iterdir()) == []
    assert private.hold().stat().st_ino == (shared / "open" / "folder").stat().st_ino


def test_faults_name_the_folder_and_not_the_descriptor(tmp_path: Path) -> None:
    private = PrivateFolder(tmp_path / "folder", "KEYE_CACHE_FOLDER")
    held = private.hold()
    with pytest.raises(FileNotFoundError) as caught, private.named():
        (held / "gone").read_bytes()
    assert caught.value.filename == str(tmp_path / "folder" / "gone")
