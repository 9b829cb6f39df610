"""A worker for each file of tests: what one message did to it, those after it would feel."""

from collections.abc import Iterator

import pytest

from keye.worker.demo.embedded_valkey import EmbeddedValkey
from tests.integration.hostile.echo_host import ECHO, EchoHost


@pytest.fixture(scope="module")
def host(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EchoHost]:
    """With the SETTINGS of the file and of its Celery APP, if it has any."""
    settings, app = getattr(request.module, "SETTINGS", {}), getattr(request.module, "APP", ECHO)
    with EmbeddedValkey() as server, EchoHost(server.url, tmp_path_factory.mktemp("host"), settings, app) as host:
        yield host
