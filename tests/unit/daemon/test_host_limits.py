"""What the host allows our processes."""

import resource
from collections.abc import Iterator

import pytest

from keye.worker.daemon.host_limits import MAX_OPEN_FILES, raise_open_files


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
