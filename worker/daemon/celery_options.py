"""Whether Celery's options still are those that jobs rely on, whatever an app or the environment made of them."""

from collections.abc import Iterator, Mapping
from typing import Any

from kombu.serialization import prepare_accept_content

from keye.worker.broker.transport import SCHEME
from keye.worker.daemon.findings import Finding, Severity

PICKLE = "application/x-python-serialize"
# Celery takes these over an app's own options.
OVERRIDES = ("CELERY_BROKER_URL", "CELERY_BROKER_READ_URL", "CELERY_BROKER_WRITE_URL", "CELERY_RESULT_BACKEND")


def check_celery(conf: Mapping[str, Any], environ: Mapping[str, str]) -> Iterator[Finding]:
    """`conf` is the app's."""
    faults = [
        Finding("Celery", Severity.FAULT, f"{option} takes pickle", "Leave it at json: a pickle runs what it likes.")
        for option in ("accept_content", "result_accept_content")
        if PICKLE in (prepare_accept_content(conf[option]) or ())
    ]
    for name in OVERRIDES:
        if environ.get(name):
            cure = "Unset it: jobs would wait in one server and be looked for in another."
            faults.append(Finding("Celery", Severity.FAULT, f"{name} takes the place of KEYE_REDIS_URL", cure))
    yield from faults or [Finding("Celery", Severity.OK, "reads json only, from KEYE_REDIS_URL")]


def check_transport(conf: Mapping[str, Any]) -> Iterator[Finding]:
    """Whether messages are read before Celery reads them."""
    if conf["broker_transport"] != SCHEME:
        found = f"broker_transport is {conf['broker_transport']!r}"
        cure = f"Leave it at {SCHEME}: by any other, one malformed message ends every worker."
        yield Finding("Celery", Severity.FAULT, found, cure)
