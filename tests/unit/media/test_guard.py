"""Only regular files inside the roots are read, whatever path leads to them."""

import os
import socket
from pathlib import Path

import pytest

from keye.config.codes import ErrorCode
from keye.config.faults import Fault
from keye.worker.media.fetch.local import open_local


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "media"
    root.mkdir()
    (root / "clip.mp4").write_bytes(b"inside")
    (tmp_path / "secret.txt").write_bytes(b"outside")
    return root


def code_of_refusal(uri: str | Path, *roots: Path, max_bytes: int = 100) -> ErrorCode:
    with pytest.raises(Fault) as caught:
        open_local(str(uri), roots, max_bytes)
    return caught.value.code


def test_path_and_file_uri_lead_to_the_same_file(root: Path) -> None:
    (root / "my clip.mp4").write_bytes(b"inside")
    for uri in (f"{root}/my clip.mp4", f"file://{root}/my%20clip.mp4", f"file://localhost{root}/my%20clip.mp4"):
        with open_local(uri, [root], 100) as file:
            assert file.read() == b"inside"


def test_links_that_stay_inside_are_followed(root: Path) -> None:
    (root / "link.mp4").symlink_to(root / "clip.mp4")
    with open_local(f"{root}/./link.mp4", [root], 100) as file:
        assert file.read() == b"inside"


@pytest.mark.holds("docs/operations.md#which-media-does-a-worker-read", "reached without `..`")
def test_dots_that_lead_up_are_forbidden_even_where_they_stay_inside(root: Path) -> None:
    for way in (f"{root}/../media/clip.mp4", f"file://{root}/%2e%2e/media/clip.mp4", f"{root}/absent/../clip.mp4"):
        assert code_of_refusal(way, root) is ErrorCode.MEDIA_FORBIDDEN, way
    (root / "a..b.mp4").write_bytes(b"inside")
    open_local(f"{root}/a..b.mp4", [root], 100).close()


@pytest.mark.holds(
    "docs/operations.md#which-media-does-a-worker-read",
    "So a file of more than one name is refused",
    "the file says how many names it has, not where",
)
def test_file_with_a_second_name_is_forbidden_since_that_may_lie_outside(root: Path, tmp_path: Path) -> None:
    os.link(tmp_path / "secret.txt", root / "harmless.mp4")
    with pytest.raises(Fault, match=r"2 names \(hard links\).*Copy") as caught:
        open_local(f"{root}/harmless.mp4", [root], 100)
    assert caught.value.code is ErrorCode.MEDIA_FORBIDDEN


def test_root_that_is_itself_a_link_works(root: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(root)
    with open_local(f"{tmp_path}/alias/clip.mp4", [tmp_path / "alias"], 100) as file:
        assert file.read() == b"inside"


@pytest.mark.holds("docs/operations.md#which-media-does-a-worker-read", "by no symbolic link that leads out")
def test_ways_out_of_the_root_are_forbidden(root: Path, tmp_path: Path) -> None:
    (root / "link.txt").symlink_to(tmp_path / "secret.txt")
    (root / "up").symlink_to(tmp_path)
    sibling = tmp_path / "media2"
    sibling.mkdir()
    (sibling / "clip.mp4").write_bytes(b"outside")
    ways = [
        tmp_path / "secret.txt",
        root / "../secret.txt",
        root / "link.txt",
        root / "up/secret.txt",
        sibling / "clip.mp4",
    ]
    for way in [*ways, f"file://{root}/%2e%2e/secret.txt", "/proc/self/environ", "/etc/passwd"]:
        assert code_of_refusal(way, root) is ErrorCode.MEDIA_FORBIDDEN, way


def test_nobody_learns_which_files_exist_outside(root: Path, tmp_path: Path) -> None:
    messages = set()
    for name in ("secret.txt", "absent.txt"):
        with pytest.raises(Fault) as caught:
            open_local(str(tmp_path / name), [root], 100)
        messages.add(caught.value.message.replace(name, ""))
    assert len(messages) == 1


def test_path_that_turns_into_a_way_out_after_the_check_is_still_refused(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swap_then_open(path: str, flags: int) -> int:
        (root / "clip.mp4").unlink()
        (root / "clip.mp4").symlink_to(tmp_path / "secret.txt")
        return real_open(path, flags)

    real_open = os.open
    monkeypatch.setattr("keye.worker.media.fetch.local.os.open", swap_then_open)
    assert code_of_refusal(root / "clip.mp4", root) is ErrorCode.MEDIA_FORBIDDEN


@pytest.mark.holds("docs/operations.md#which-media-does-a-worker-read", "regular files, reached")
def test_what_is_no_regular_file_is_refused_without_waiting(root: Path) -> None:
    os.mkfifo(root / "fifo")
    (root / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(root / "socket"))
        for name in ("fifo", "folder", "socket"):
            assert code_of_refusal(root / name, root) is ErrorCode.MEDIA_FORBIDDEN, name
    assert code_of_refusal("/dev/zero", Path("/dev")) is ErrorCode.MEDIA_FORBIDDEN


def test_what_is_not_there_is_not_found(root: Path) -> None:
    for path in (root / "absent.mp4", root / "clip.mp4/below", f"{root}/\0", f"file://elsewhere{root}/clip.mp4"):
        assert code_of_refusal(path, root) is ErrorCode.MEDIA_NOT_FOUND, path


def test_without_roots_local_files_are_off(root: Path) -> None:
    assert code_of_refusal(root / "clip.mp4") is ErrorCode.MEDIA_FORBIDDEN


def test_size_is_checked_before_reading(root: Path) -> None:
    assert code_of_refusal(root / "clip.mp4", root, max_bytes=5) is ErrorCode.MEDIA_TOO_LARGE
    (root / "empty.mp4").touch()
    assert code_of_refusal(root / "empty.mp4", root) is ErrorCode.MEDIA_CORRUPT


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_file_the_worker_may_not_read_is_forbidden(root: Path) -> None:
    (root / "clip.mp4").chmod(0)
    assert code_of_refusal(root / "clip.mp4", root) is ErrorCode.MEDIA_FORBIDDEN
