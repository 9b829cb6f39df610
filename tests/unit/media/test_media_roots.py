"""A media root that is unmounted or replaced is the host's fault, not the fault of the jobs whose files lay in it."""

import shutil
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest

from keye.config.codes import ErrorCode
from keye.config.faults import Fault
from keye.config.job import ImagePart
from keye.config.settings import Settings
from keye.worker.host_fault import HostFault
from keye.worker.media.job_media import MediaCache, MediaLimits, fetch
from keye.worker.media.media_roots import MediaRoots
from tests.support.mounts import mounted

Read = Callable[[str | Path], bytes]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "media"
    root.mkdir()
    return root


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """Another root, whose files are had as long as the first is right."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "clip.mp4").write_bytes(b"elsewhere")
    return folder


def reader(*roots: Path) -> Read:
    """What a worker started now has of a path."""
    limits = MediaLimits.of(Settings(media_roots=roots))

    def read(path: str | Path) -> bytes:
        (fetched,) = fetch([ImagePart(uri=str(path))], limits, MediaCache(roots[0].parent / "cache", 0))
        with fetched as file:
            return file.read()

    return read


def is_away(read: Read, *paths: Path) -> bool:
    """Whatever a job asks for, also what would have been its own fault."""
    for path in paths:
        with pytest.raises(HostFault, match=r"The media root .* was unmounted or replaced\. Mount it again, or"):
            read(path)
    return True


def test_unmounted_root_is_the_hosts_fault_until_it_is_mounted_again(root: Path, elsewhere: Path) -> None:
    asked = (root / "clip.mp4", root / "absent.mp4", Path("/etc/passwd"), elsewhere / "clip.mp4")
    with mounted(root):
        (root / "clip.mp4").write_bytes(b"inside")
        read = reader(root, elsewhere)
        assert read(root / "clip.mp4") == b"inside"
    assert is_away(read, *asked)
    # What is mounted meanwhile takes the number of the device that was there.
    with mounted(root.parent / "another"), mounted(root):
        (root / "clip.mp4").write_bytes(b"again")
        assert read(root / "clip.mp4") == b"again"
        assert read(elsewhere / "clip.mp4") == b"elsewhere"
        with pytest.raises(Fault) as caught:
            read(root / "absent.mp4")
        assert caught.value.code is ErrorCode.MEDIA_NOT_FOUND
    assert is_away(read, *asked)


def test_root_within_a_file_system_goes_and_comes_with_it(root: Path) -> None:
    folder = root / "of" / "clips"
    folder.mkdir(parents=True)
    with mounted(root):
        folder.mkdir(parents=True)
        inode = folder.stat().st_ino
        read = reader(folder)
    # The empty folders beneath are there, and must not pass for those above.
    assert is_away(read, folder / "clip.mp4")
    with mounted(root.parent / "another"), mounted(root):
        folder.mkdir(parents=True)
        (folder / "clip.mp4").write_bytes(b"again")
        assert folder.stat().st_ino == inode
        assert read(folder / "clip.mp4") == b"again"


@pytest.mark.parametrize("name", ["clips", "of my own", "größe"])
def test_what_was_mounted_below_a_root_is_missed_only_by_who_wants_it(root: Path, name: str) -> None:
    (root / "clip.mp4").write_bytes(b"inside")
    below = root / name
    with mounted(below):
        (below / "clip.mp4").write_bytes(b"below")
        read = reader(root)
        assert read(below / "clip.mp4") == b"below"
    for uri in (f"{below}/clip.mp4", f"file://{quote(str(below))}/of/absent.mp4"):
        with pytest.raises(HostFault, match=f"{name}, below a media root, was mounted at start and is not"):
            read(uri)
    assert read(root / "clip.mp4") == b"inside"
    with pytest.raises(Fault):
        read(root / "absent.mp4")
    with mounted(below), pytest.raises(Fault):
        read(below / "clip.mp4")
    for uri in (f"file://{quote(str(below))}/%00", f"file://{quote(str(below))}/%ff", "file://[/x"):
        with pytest.raises((Fault, HostFault)):
            read(uri)


def test_remount_that_nobody_saw_is_no_fault(root: Path) -> None:
    with mounted(root):
        roots = MediaRoots([root])
        roots.check()
    with mounted(root.parent / "another"), mounted(root):
        roots.check()


@pytest.mark.parametrize("is_made_anew", [True, False])
def test_replaced_root_is_the_hosts_fault_until_it_is_back(root: Path, is_made_anew: bool) -> None:
    (root / "clip.mp4").write_bytes(b"inside")
    read = reader(root)
    root.rename(root.parent / "moved")
    if is_made_anew:
        root.mkdir()
        assert is_away(read, root / "clip.mp4")
        root.rmdir()
    with pytest.raises(HostFault, match=r"cannot be reached: No such file or directory\. Mount it again"):
        read(root / "clip.mp4")
    (root.parent / "moved").rename(root)
    assert read(root / "clip.mp4") == b"inside"


def test_file_in_the_place_of_a_root_is_the_hosts_fault(root: Path) -> None:
    read = reader(root)
    root.rmdir()
    root.write_bytes(b"")
    with pytest.raises(HostFault, match="is no folder that can be read"):
        read(root / "clip.mp4")


def test_root_that_was_missing_at_start_is_noted_when_it_comes(root: Path) -> None:
    root.rmdir()
    read = reader(root)
    with pytest.raises(HostFault, match="cannot be reached"):
        read(root / "clip.mp4")
    root.mkdir()
    (root / "clip.mp4").write_bytes(b"inside")
    assert read(root / "clip.mp4") == b"inside"
    shutil.move(root, root.parent / "moved")
    root.mkdir()
    assert is_away(read, root / "clip.mp4")


def test_link_that_is_pointed_elsewhere_is_meant_so(root: Path, elsewhere: Path) -> None:
    current = root.parent / "current"
    current.symlink_to(root)
    read = reader(current)
    with pytest.raises(Fault):
        read(current / "clip.mp4")
    current.unlink()
    current.symlink_to(elsewhere)
    assert read(current / "clip.mp4") == b"elsewhere"
    elsewhere.rename(root.parent / "moved")
    elsewhere.mkdir()
    assert is_away(read, current / "clip.mp4")
