"""Whatever another user of the host does to the cache: no file of ours is changed by it, and no medium is theirs."""

import hashlib
import os
import random
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from keye.worker.daemon.findings import Severity
from keye.worker.daemon.preflight import check_media_cache
from keye.worker.media.fetch.media_cache import MediaCache
from tests.support import neighbour
from tests.support.neighbour import needs_root

pytestmark = needs_root

CLIP = random.Random(1).randbytes(2**16)


@pytest.fixture
def shared() -> Iterator[Path]:
    with neighbour.shared_folder() as folder:
        yield folder


@pytest.fixture
def home(shared: Path) -> Path:
    """Of the worker's user: what the cache would evict, count in and remove."""
    folder = shared / "home"
    for name in ("whole", "partial", "digest"):
        (folder / name).mkdir(parents=True)
        (folder / name / "thesis.doc").write_bytes(b"x" * 2000)
    (folder / "ledger").write_text("my own accounts\n")
    folder.chmod(0o700)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write(handle: int) -> None:
    os.pwrite(handle, CLIP, 0)


def read(cache: MediaCache, download: Callable[[int], None] = write) -> bytes:
    with cache.open(("clip",), len(CLIP), download) as file:
        return file.read()


@pytest.mark.holds(
    "docs/operations.md#other-users-have-accounts-on-this-host-what-can-they-do",
    "A folder or a link of another user's, there or on the way there, is refused",
)
@pytest.mark.parametrize(
    "script",
    [
        "mkdir -m 777 $1",
        "mkdir -m 777 $1 $1/whole $1/partial $1/digest; touch $1/ledger",
        "ln -s $2 $1",
        "mkdir -m 777 $1; ln -s $2/whole $1/whole; ln -s $2/ledger $1/ledger",
        "mkfifo $1",
    ],
)
def test_folder_that_another_user_has_made_first_is_refused_and_named(shared: Path, home: Path, script: str) -> None:
    before = content(home)
    neighbour.does(script, shared / "cache", home)
    finding = check_media_cache(shared / "cache", 1000)
    assert finding.severity is Severity.FAULT
    assert str(shared / "cache") in finding.found
    assert "KEYE_CACHE_FOLDER" in finding.cure
    with pytest.raises(OSError, match=str(shared / "cache")):
        MediaCache(shared / "cache", 1000)
    assert content(home) == before


def test_what_is_kept_is_nobody_elses_to_write_or_read_whatever_the_umask(shared: Path) -> None:
    before = os.umask(0)
    try:
        assert read(MediaCache(shared / "cache", 2**20)) == CLIP
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (shared / "cache").iterdir()}
    assert modes == {"whole": 0o700, "partial": 0o700, "digest": 0o700, "ledger": 0o600}
    (shared / "cache").chmod(0o755)
    for script in ("ls $1/whole/", "cat $1/ledger", "touch $1/new", "flock --nonblock $1/ledger true", "mv $1 $1.gone"):
        with pytest.raises(Exception, match="non-zero exit status"):
            neighbour.does(script, shared / "cache")


def test_folder_of_ours_that_is_open_to_others_is_told_of_and_what_they_put_there_not_used(
    shared: Path, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (shared / "cache").mkdir()
    (shared / "cache").chmod(0o777)
    before = content(home)
    neighbour.does("ln -s $2/whole $1/whole; ln -s $2/ledger $1/ledger; mkfifo $1/partial", shared / "cache", home)
    finding = check_media_cache(shared / "cache", 2**20)
    assert finding.severity is Severity.WARNING
    assert "may be written by others (mode 777)" in finding.found
    assert "chmod go-w" in finding.cure
    assert read(MediaCache(shared / "cache", 2**20)) == CLIP
    assert ["may be written by others" in line for line in caplog.messages] == [True]
    assert content(home) == before


# What others left in a folder of ours from the time when they could, with $1 the cache, $2 its medium, $3 a home.
PLANTED = {
    "media of theirs": "cp $1/../clip $1/whole/$2; cp $1/../sum $1/digest/$2",
    "a download of theirs": "cp $1/../clip $1/partial/$2; chmod 600 $1/partial/$2",
    "a ledger of theirs": "cp $1/../clip $1/ledger; chmod 600 $1/ledger",
    "pipes": "mkfifo $1/whole/$2 $1/partial/$2 $1/digest/$2 $1/ledger",
    "links to ours": "ln -s $3/ledger $1/ledger; ln -s $3/ledger $1/partial/$2; ln -s $3/ledger $1/whole/$2",
    "folders of links": "rmdir $1/*/; ln -s $3/whole $1/whole; ln -s $3/partial $1/partial; ln -s $3/digest $1/digest",
    "folders of theirs": "rmdir $1/*/; mkdir $1/whole $1/partial $1/digest; touch $1/whole/$2 $1/partial/$2",
}


@pytest.mark.parametrize("planted", PLANTED)
def test_what_others_left_in_it_is_not_used(shared: Path, home: Path, planted: str) -> None:
    read(MediaCache(shared / "cache", 2**20))
    (whole,) = (shared / "cache" / "whole").iterdir()
    forged = CLIP[::-1]
    for name, what in (("clip", forged), ("sum", hashlib.sha256(forged).digest())):
        (shared / name).write_bytes(what)
        (shared / name).chmod(0o644)
    before = content(home)
    for path in ((shared / "cache" / "ledger"), whole, shared / "cache" / "digest" / whole.name):
        path.unlink()
    for path in ((shared / "cache"), *(shared / "cache").iterdir()):
        path.chmod(0o777)
    neighbour.does(PLANTED[planted], shared / "cache", whole.name, home)
    (shared / "cache").chmod(0o755)
    cache = MediaCache(shared / "cache", 2**20)
    for _ in range(2):
        assert read(cache) == CLIP
    assert MediaCache(shared / "cache", 2 * len(CLIP)).num_bytes == len(CLIP)
    for path in (shared / "cache").rglob("*"):
        found = path.lstat()
        assert (found.st_uid, found.st_mode & 0o022) == (0, 0), path
    assert content(home) == before


def test_download_is_not_written_to_a_file_that_has_another_name_too(shared: Path) -> None:
    cache = MediaCache(shared / "cache", 2**20)
    read(cache)
    (whole,) = (shared / "cache" / "whole").iterdir()
    precious = shared / "precious"
    precious.write_bytes(b"precious")
    for place in ("partial", "whole"):
        whole.unlink(missing_ok=True)
        os.link(precious, shared / "cache" / place / whole.name)
        assert read(cache) == CLIP
    assert precious.read_bytes() == b"precious"


@pytest.mark.holds(
    "docs/operations.md#other-users-have-accounts-on-this-host-what-can-they-do",
    "others can move away what is below it",
)
def test_medium_that_is_open_and_the_next_are_right_when_others_move_the_folder_away(
    shared: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (shared / "volume").mkdir()
    (shared / "volume").chmod(0o777)
    cache = MediaCache(shared / "volume" / "cache", 2**20)
    with cache.open(("clip",), len(CLIP), write) as file:
        neighbour.does("mv $1/cache $1/gone", shared / "volume")
        assert file.read() == CLIP
    assert read(cache) == CLIP
    with cache.open(("other",), len(CLIP), write) as file:
        assert file.read() == CLIP
    assert (shared / "volume" / "cache" / "whole").is_dir()
    neighbour.does("mv $1/cache $1/gone2; mkdir $1/cache", shared / "volume")
    assert [read(cache) for _ in range(2)] == [CLIP, CLIP], "what is held goes on"
    assert list((shared / "volume" / "cache").iterdir()) == []


@pytest.mark.holds(
    "docs/operations.md#other-users-have-accounts-on-this-host-what-can-they-do",
    "what is kept lies in `keye-<uid>` in it",
)
def test_volume_of_kubernetes_is_used_by_a_worker_that_does_not_own_it(shared: Path) -> None:
    (shared / "volume").mkdir()
    os.chown(shared / "volume", 0, 999)
    (shared / "volume").chmod(0o2777)
    imports = """
from pathlib import Path
from keye.worker.daemon.preflight import check_media_cache, check_run_folder, check_spool
from keye.worker.media.fetch.media_cache import MediaCache
from keye.worker.telemetry.health import HostFolder, judge_host
"""
    code = """
volume = Path(sys.argv[1])
for look in (lambda: check_media_cache(volume, 2**20), lambda: check_spool(volume), lambda: check_run_folder(volume)):
    print(look().severity)
cache = MediaCache(volume, 2**20)
for _ in range(2):
    with cache.open(("clip",), 4, lambda handle: os.pwrite(handle, b"clip", 0)) as file:
        print(file.read().decode())
folder = HostFolder(volume)
folder.tell({"cpu": "ready"}, is_draining=False)
print(*judge_host(volume))
"""
    said = neighbour.python_as(999, imports, code, shared / "volume").split("\n")
    # Here, and not in a container, it is no volume: others of this host could move what is in it.
    assert said == ["warning"] * 3 + ["clip"] * 2 + ["True True cpu ready", ""]
    assert [path.name for path in (shared / "volume").iterdir()] == ["keye-999"]
