"""A `.env` that somebody else may have written says nothing, and stops nobody."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from keye.config import env_file
from keye.config.aws import load_aws_names
from keye.config.faults import InvalidSettings
from keye.config.settings import ProducerSettings, Settings
from tests.support import neighbour
from tests.support.neighbour import needs_root

pytestmark = needs_root

THEIRS = "KEYE_RESULT_TTL_SECONDS=77\nKEYE_RUN_FOLDER=/theirs\nAWS_PROFILE=theirs\n"


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, below one such as /tmp."""
    for name in ("AWS_PROFILE", "KEYE_RUN_FOLDER", "KEYE_RESULT_TTL_SECONDS"):
        monkeypatch.setenv(name, "")
    env_file._told.clear()
    with neighbour.shared_folder() as folder:
        (folder / "theirs").write_text(THEIRS)
        (folder / "theirs").chmod(0o644)
        monkeypatch.chdir(folder)
        yield folder


def assert_not_read() -> None:
    for settings in (ProducerSettings.read(), Settings.read()):
        assert settings.result_ttl_seconds == 86400
    load_aws_names()
    assert os.environ["AWS_PROFILE"] == ""
    assert "KEYE_RUN_FOLDER" not in set(Settings.names_given()) - set(os.environ)


FOREIGN = {
    "a file": "cp $1/theirs $1/.env; chmod 644 $1/.env",
    "a file that only they may read": "cp $1/theirs $1/.env; chmod 600 $1/.env",
    "a link to a file": "cp $1/theirs $1/x; ln -s $1/x $1/.env",
    "a link to a file of ours": "ln -s $1/theirs $1/.env",
    "a pipe": "mkfifo $1/.env",
    "a link to a device": "ln -s /dev/zero $1/.env",
    "a folder": "mkdir $1/.env",
    "a link to itself": "ln -s .env $1/.env",
    "a link to nowhere": "ln -s nowhere $1/.env",
}


@pytest.mark.holds(
    "docs/operations.md#other-users-have-accounts-on-this-host-what-can-they-do",
    "A `.env` of another user's is passed over with a warning",
)
@pytest.mark.parametrize("foreign", FOREIGN)
def test_what_another_user_has_put_there_is_passed_over(
    folder: Path, caplog: pytest.LogCaptureFixture, foreign: str
) -> None:
    neighbour.does(FOREIGN[foreign], folder)
    for _ in range(2):
        assert_not_read()
    assert ["is not read" in line for line in caplog.messages] == [True] * (foreign != "a folder")


def test_commands_go_on_beside_it_and_say_so(folder: Path) -> None:
    neighbour.does(FOREIGN["a pipe"], folder)
    for name, argument in (("worker.daemon.entry import main", "probe"), ("producer.cli import app as main", "status")):
        code = f"import sys; from keye.{name}; sys.argv[1:] = [{argument!r}]; main()"
        told = subprocess.run(
            [sys.executable, "-P", "-c", code],
            env=os.environ | {"KEYE_REDIS_URL": "redis://127.0.0.1:1/0"},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert f".env in {folder} is not read: it belongs to another user (uid {neighbour.UID})" in told.stderr
        assert "/theirs" not in told.stdout
        assert "Traceback" not in told.stderr


def test_a_file_of_ours_that_others_moved_there_is_passed_over(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As an upload is, which says what they like, in a folder that all may write to and that is not sticky."""
    (folder / "uploads").mkdir()
    (folder / "uploads").chmod(0o777)
    (folder / "uploads" / "photo.jpg").write_text(THEIRS)
    neighbour.does("mv $1/photo.jpg $1/.env", folder / "uploads")
    monkeypatch.chdir(folder / "uploads")
    assert_not_read()
    assert "all may write to the folder (mode 777)" in caplog.text


@pytest.mark.holds(
    "docs/operations.md#other-users-have-accounts-on-this-host-what-can-they-do",
    "one of your own that others may write to ends the start",
)
@pytest.mark.parametrize("mode", [0o666, 0o646, 0o664, 0o620])
def test_a_file_of_ours_that_others_may_write_is_refused(folder: Path, mode: int) -> None:
    path = folder / ".env"
    path.write_text(THEIRS)
    os.chown(path, 0, neighbour.UID)
    path.chmod(mode)
    for read in (ProducerSettings.read, Settings.read):
        with pytest.raises(InvalidSettings, match=rf"others may write to it \(mode {mode:o}\).*chmod go-w"):
            read()
    path.chmod(0o640)
    assert Settings.read().result_ttl_seconds == 77


def make_link(path: Path) -> None:
    path.with_name("real").write_text(THEIRS)
    path.symlink_to("real")


def make_of_own_group(path: Path) -> None:
    path.write_text(THEIRS)
    path.chmod(0o664)


def make_readable(path: Path) -> None:
    path.write_text(THEIRS)
    path.chmod(0o444)


@pytest.mark.parametrize("make", [make_link, make_of_own_group, make_readable])
def test_a_file_of_ours_is_read(folder: Path, make: Callable[[Path], None]) -> None:
    make(folder / ".env")
    assert Settings.read().result_ttl_seconds == 77


def test_a_file_of_roots_is_read_by_others(folder: Path) -> None:
    make_readable(folder / ".env")
    code = "os.chdir(sys.argv[1]); print(Settings.read().result_ttl_seconds)"
    imports = "from keye.config.settings import Settings\nSettings.read()"
    assert neighbour.python_as(999, imports, code, folder) == "77\n"
