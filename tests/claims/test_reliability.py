"""docs/reliability.md: that its numbers are those of the tests that it names, and of what it promises."""

import re
from pathlib import Path

import pytest

from keye.config.quarantine import MAX_MESSAGES
from keye.config.settings import Settings
from keye.worker.results.outbox import Spool
from tests.support.checkout import ROOT
from tests.support.scale import LONG, SHORT

PAGE = (ROOT / "docs" / "reliability.md").read_text()


@pytest.mark.holds(
    "docs/reliability.md#promises",
    "What Redis does not take is kept in memory and on disk",
    "Proven by `tests/integration/hostile` and by messages drawn at random",
    "Proven by `tests/acceptance`, where an engine hangs both ways",
    "Proven by `tests/acceptance/test_hung_job.py`",
    "Proven by `tests/chaos/test_silent_connections.py`",
)
def test_the_bounds_of_the_promises_are_those_of_the_code_and_their_tests_are_there() -> None:
    kept = Spool(Path("/nowhere"))
    assert f"at most {kept.max_files:,} outcomes in {kept.max_bytes >> 20} MiB" in PAGE
    assert f"`KEYE_LEASE_SECONDS`, {Settings.model_fields['lease_seconds'].default:g})" in PAGE
    assert f"the newest {MAX_MESSAGES:,}" in PAGE
    short, long = SHORT.num_hostile_messages, LONG.num_hostile_messages
    assert f"{short:,} in `make test`, {long:,} in `make soak`" in PAGE
    for named in re.findall(r"`(tests/[^`]+)`", PAGE):
        assert (ROOT / named).exists(), named


@pytest.mark.holds(
    "docs/reliability.md#the-chaos-tests",
    "differ only in the numbers of `tests/support/scale.py`",
)
def test_the_numbers_of_the_chaos_tests_are_those_they_run_with() -> None:
    away, (longer, longest) = SHORT.broker_away_seconds[0], LONG.broker_away_seconds
    for told in (
        f"seen, short form (lease {SHORT.lease_seconds:g} s) | seen, long form (lease {LONG.lease_seconds:g} s)",
        f"drain {SHORT.drain_seconds:g} s ({LONG.drain_seconds:g} s)",
        f"SIGKILL of the server for {away:g} s ({longer:g} s, {longest:g} s)",
        f"for {SHORT.refusal_seconds:g} s ({LONG.refusal_seconds:g} s) each",
        f"jobs of {SHORT.longest_job_seconds:g} s ({LONG.longest_job_seconds:,} s)",
        f"{SHORT.num_hostile_messages:,} ({LONG.num_hostile_messages:,}) messages",
        f"within lease + {SHORT.restart_seconds - SHORT.lease_seconds:g} s (long: {LONG.restart_seconds:g} s)",
        f"drain {SHORT.lease_seconds / 3:g} s ({LONG.lease_seconds / 3:g} s)",
        f"| {SHORT.num_kills} kills of",
        f"| {LONG.num_kills:,} kills of",
    ):
        assert told in PAGE, told
    readers = {file.name for file in ROOT.glob("tests/**/*.py") if "SOAK" in file.read_text()}
    assert readers - {Path(__file__).name} == {"scale.py"}
