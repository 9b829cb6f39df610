"""Folders as people have them: each picture and video below comes once, in an order in which one can go on."""

import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from keye.config.faults import InvalidBatch, InvalidJob
from keye.config.settings import Settings
from keye.producer.batch.listing import Folder
from keye.producer.batch.source import Position
from keye.producer.client import build_job
from keye.producer.upload import Media

JPEG = b"\xff\xd8\xff\xe0"


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of this name where the process runs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    return tmp_path / "photos"


def fill(folder: Path, *names: str | bytes) -> None:
    for name in names:
        path = os.path.join(os.fsencode(folder), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(JPEG)


def names_of(folder: Folder | str) -> list[str | None]:
    found = folder if isinstance(folder, Folder) else Folder(folder)
    return [line.custom_id for line in found.lines()]


def test_pictures_and_videos_come_in_the_order_of_their_paths(photos: Path) -> None:
    fill(photos, "b.JPG", "a.jpg", "a/z.png", "a/b/c.mp4", "a-1/x.jpg", "ä.jpg", "B.jpeg", "hash", "notes/of.me/1.webp")
    fill(photos, ".hidden.jpg", ".hidden/x.jpg", "a/.x.jpg")
    (photos / "notes.txt").write_text("no picture")
    (photos / "empty").mkdir()
    (photos / "list.csv").write_text("media")
    found = Folder("photos")
    names = names_of(found)
    assert names == sorted(names)
    assert set(names) == {
        *("b.JPG", "a.jpg", "a/z.png", "a/b/c.mp4", "a-1/x.jpg", "ä.jpg", "B.jpeg", "notes/of.me/1.webp"),
        "hash",  # its bytes tell
    }
    assert found.num_passed_over == 2
    assert found.position == Position("ä.jpg".encode(), 9, num_passed_over=2)


@pytest.mark.holds(
    "docs/batches.md#what-can-the-input-be",
    "a folder |",
)
@pytest.mark.parametrize("given", ["photos", "photos/", "./photos", "photos/../photos", "../{here}/photos", "link"])
def test_files_of_a_relative_path_are_sent(photos: Path, given: str) -> None:
    fill(photos, "a/1.jpg")
    Path("link").symlink_to("photos")
    (line,) = Folder(given.format(here=Path.cwd().name)).lines()
    assert line.custom_id == "a/1.jpg"
    assert job_of(line.asked) == ["data:image/jpeg;base64,/9j/4A=="]


@pytest.mark.parametrize("given", [".", "./", "..//x"])
def test_the_current_folder_is_one(photos: Path, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    fill(photos, "x/1.jpg", "1.jpg")
    monkeypatch.chdir(photos / "x")
    (line,) = Folder(given).lines()
    assert job_of(line.asked) == ["data:image/jpeg;base64,/9j/4A=="]


def test_paths_of_an_absolute_one_are_what_is_sent(photos: Path) -> None:
    fill(photos, "a/1?#%20.jpg")
    (line,) = Folder(f"{photos}/").lines()
    assert job_of(line.asked) == [f"{photos}/a/1?#%20.jpg"]


def job_of(asked: Any) -> list[str]:
    return [part.uri for part in build_job({"prompt": "?", **asked}, Media(Settings())).media]


@pytest.mark.parametrize(
    "name",
    [
        "a\nb.jpg",
        "'a' \"b\".jpg",
        "-rf.jpg",
        "s3:x.jpg",
        "data:x.jpg",
        "a?b.jpg",
        "a#b%20.jpg",
        " .jpg",
        "a\\b.jpg",
        "日.jpg",
    ],
)
def test_a_file_may_have_any_name(photos: Path, name: str) -> None:
    fill(photos, name)
    source = Folder("photos")
    (line,) = source.lines()
    assert line.custom_id == name
    assert job_of(line.asked) == ["data:image/jpeg;base64,/9j/4A=="]
    assert source.read(line.number, line.start) == line


def test_a_name_that_is_no_text_is_called_by_its_bytes(photos: Path) -> None:
    fill(photos, b"caf\xe9.jpg", b"d\xff/1.jpg")
    source = Folder("photos")
    lines = list(source.lines())
    assert [line.custom_id for line in lines] == ["caf\\xe9.jpg", "d\\xff/1.jpg"]
    assert [job_of(source.read(line.number, line.start).asked) for line in lines] == [
        ["data:image/jpeg;base64,/9j/4A=="]
    ] * 2


def test_a_path_too_long_for_a_name_costs_itself(photos: Path) -> None:
    fill(photos, "/".join(["x" * 200] * 6) + "/1.jpg", "z.jpg")
    long, short = Folder("photos").lines()
    assert isinstance(long.asked, InvalidJob)
    assert (long.custom_id, short.custom_id) == (None, "z.jpg")


def test_links_to_files_are_followed_and_those_to_folders_are_not(photos: Path) -> None:
    fill(photos, "a/1.jpg")
    (photos / "to-file.jpg").symlink_to("a/1.jpg")
    (photos / "to-folder").symlink_to("a")
    (photos / "a" / "circle").symlink_to("..")
    (photos / "itself.jpg").symlink_to("itself.jpg")
    (photos / "nowhere.jpg").symlink_to("gone.jpg")
    source = Folder("photos")
    assert names_of(source) == ["a/1.jpg", "to-file.jpg"]
    assert source.num_passed_over == 4


def test_what_is_no_file_is_passed_over_and_not_waited_for(photos: Path) -> None:
    os.mkfifo(photos / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind("photos/socket.jpg")
        fill(photos, "x.jpg")
        assert names_of("photos") == ["x.jpg"]


def test_a_file_that_vanishes_costs_itself(photos: Path) -> None:
    fill(photos, "1.jpg", "2.jpg", "d/3.jpg", "e/4.jpg")
    source = Folder("photos")
    lines = source.lines()
    first = next(lines)
    (photos / "1.jpg").unlink()
    (photos / "2.jpg").unlink()
    shutil.rmtree(photos / "d")
    assert source.read(first.number, first.start) == first
    with pytest.raises(InvalidJob, match=r"there is no './photos/1.jpg' in "):
        job_of(first.asked)
    assert [line.custom_id for line in lines] == ["2.jpg", "e/4.jpg"]


@pytest.mark.parametrize("given", ["photos", "/nonexistent/folder"])
def test_a_folder_that_is_not_there_is_told(photos: Path, given: str) -> None:
    photos.rmdir()
    with pytest.raises(InvalidBatch, match=r"cannot be listed: No such file or directory\. Begin this again"):
        names_of(given)


def test_it_goes_on_behind_any_of_its_files(photos: Path) -> None:
    fill(photos, "a.jpg", "a/1.jpg", "a/b/2.jpg", "a/b.jpg", "a0.jpg", "b/1.jpg", "b!.jpg", b"b\xff/1.jpg")
    source = Folder("photos")
    positions = []
    for _ in source.lines():
        positions.append(source.position)
    names = names_of("photos")
    for number, position in enumerate(positions, 1):
        later = Folder("photos")
        later.go_to(position)
        assert names_of(later) == names[number:]
        assert later.position == positions[-1]


def test_what_changes_while_it_is_read_comes_once(photos: Path) -> None:
    fill(photos, "b/1.jpg", "d.jpg", "e/1.jpg")
    source = Folder("photos")
    seen = []
    for line in source.lines():
        seen.append(line.custom_id)
        if len(seen) == 1:
            fill(photos, "a.jpg", "b/0.jpg", "e/0.jpg", "e/2.jpg", "f.jpg")
    assert seen == ["b/1.jpg", "d.jpg", "e/0.jpg", "e/1.jpg", "e/2.jpg"]
    assert names_of(source) == ["f.jpg"]  # begun again


def test_a_folder_that_became_a_file_and_the_other_way_round(photos: Path) -> None:
    fill(photos, "a/1.jpg", "b.jpg")
    source = Folder("photos")
    lines: Iterator[Any] = source.lines()
    assert next(lines).custom_id == "a/1.jpg"
    shutil.rmtree(photos / "a")
    fill(photos, "a", "b.jpg.d/1.jpg")
    assert names_of(source) == ["b.jpg", "b.jpg.d/1.jpg"]


def test_twenty_thousand_files_and_folders_without_end(photos: Path) -> None:
    for number in range(20_000):
        os.mknod(photos / f"{number:05}.png")
    deep = f"{photos}"
    for _ in range(1010):
        deep += "/d"
        os.mkdir(deep)
    os.mknod(f"{deep}/1.png")
    names = names_of("photos")
    os.unlink(f"{deep}/1.png")
    os.removedirs(deep)
    assert names == [f"{number:05}.png" for number in range(20_000)] + [None]
