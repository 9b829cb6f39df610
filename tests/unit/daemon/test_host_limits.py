"""What the host allows our processes."""

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from keye.config.settings import Settings
from keye.worker.daemon.findings import Severity, select
from keye.worker.daemon.host_limits import MAX_OPEN_FILES, check_host_limits, raise_open_files

# Another user than root, whose threads are not bounded.
FINDINGS = """
import os, resource, sys
from keye.config.settings import Settings
from keye.worker.daemon.host_limits import check_host_limits
limit, number = int(sys.argv[1]), int(sys.argv[2])
resource.setrlimit(limit, (number, number))
if os.geteuid() == 0:
    os.setuid(65534)
for finding in check_host_limits(Settings(concurrency=8, decoders=2)):
    if finding.severity != "ok":
        print(f"{finding.severity}: {finding}")
"""


@pytest.fixture
def limits() -> Iterator[None]:
    """Whatever becomes of this process' soft limits."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.usefixtures("limits")
def test_the_limit_on_open_files_is_raised_as_far_as_it_may_be_and_never_lowered() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    raised = hard if 0 <= hard < MAX_OPEN_FILES else MAX_OPEN_FILES
    for soft in (1024, raised, hard):
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        raise_open_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard if soft == hard else raised, hard)


def findings_with(limit: int, number: int) -> str:
    program = [sys.executable, "-c", FINDINGS, str(limit), str(number)]
    return subprocess.run(program, stdout=subprocess.PIPE, text=True, check=True).stdout


@pytest.mark.holds(
    "docs/operations.md#it-does-not-start-why",
    "Limits of the host are held against",
)
def test_limits_are_held_against_the_jobs_at_a_time_and_the_cure_says_how_many_fit() -> None:
    assert findings_with(resource.RLIMIT_NOFILE, 1024) == ""
    assert findings_with(resource.RLIMIT_NOFILE, 300) == (
        "warning: open files: at most 300 (the hard limit), and 8 jobs that fetch or decode 8 large media "
        "each need 648. Raise it (ulimit -Hn, LimitNOFILE= of systemd, --ulimit nofile of docker), or lower "
        "KEYE_CONCURRENCY to 3.\n"
    )
    assert "warning: threads: at most 500 (ulimit -u)" in findings_with(resource.RLIMIT_NPROC, 500)
    assert "or lower KEYE_CONCURRENCY to 5." in findings_with(resource.RLIMIT_NPROC, 500)


@pytest.mark.holds("docs/operations.md#it-does-not-start-why", "where none could run, it is a fault")
def test_it_is_a_fault_where_no_job_could_run() -> None:
    assert "fault: open files: at most 24 (the hard limit)" in findings_with(resource.RLIMIT_NOFILE, 24)
    assert "fault: threads: at most 24 (ulimit -u)" in findings_with(resource.RLIMIT_NPROC, 24)


def test_a_disk_without_room_is_named_with_its_setting() -> None:
    assert os.statvfs("/proc").f_bavail == 0
    findings = [*check_host_limits(Settings(spool_folder=Path("/proc/keye"), concurrency=8, host_workers=2))]
    (full,) = select(findings, Severity.WARNING)
    assert str(full) == (
        "disk: /proc/keye has room for 0.0 MiB, and all jobs under way may need 16. Delete what is not needed there, "
        "or set KEYE_SPOOL_FOLDER to another disk."
    )
