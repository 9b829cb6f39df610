"""What all commands of `keye` share."""

import os
import pty

import pytest
import typer

from keye.producer.shell import ExitCode, confirmed


@pytest.mark.parametrize(
    ("typed", "is_confirmed"),
    [("y\n", True), (" Yes \n", True), ("\n", False), ("n\n", False), ("yesterday\n", False), ("\x04", False)],
)
def test_only_a_yes_at_the_terminal_is_one(
    typed: str, is_confirmed: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, theirs = pty.openpty()
    os.write(ours, typed.encode())
    with open(theirs) as terminal:
        monkeypatch.setattr("sys.stdin", terminal)
        assert confirmed("Cancel 3 jobs?", False) is is_confirmed
        assert confirmed("Cancel 3 jobs?", True)
    os.close(ours)
    assert tuple(capsys.readouterr()) == ("", "Cancel 3 jobs? [y/N] ")


def test_where_nobody_can_be_asked_only_yes_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open(os.devnull) as nothing:
        monkeypatch.setattr("sys.stdin", nothing)
        assert confirmed("Cancel 3 jobs?", True)
        with pytest.raises(typer.Exit) as ended:
            confirmed("Cancel 3 jobs?", False)
    assert ended.value.exit_code == ExitCode.INVALID
    assert capsys.readouterr().err == "Cancel 3 jobs? Standard input is no terminal to ask at: say --yes.\n"
