"""Celery's options as an operator may have changed them."""

import pytest
from celery import Celery

from keye.worker.daemon.findings import Severity
from keye.worker.daemon.preflight import check_celery


def test_json_from_our_own_server_is_right() -> None:
    app = Celery()
    app.conf.accept_content = ["json"]
    assert [finding.severity for finding in check_celery(app.conf, {})] == [Severity.OK]


@pytest.mark.parametrize("name", ["pickle", "application/x-python-serialize"])
def test_an_app_that_takes_pickle_is_refused(name: str) -> None:
    app = Celery()
    app.conf.accept_content = ["json", name]
    (finding,) = check_celery(app.conf, {})
    assert finding.severity is Severity.FAULT
    assert "pickle" in str(finding)


def test_a_variable_that_leads_celery_to_another_server_is_refused() -> None:
    (finding,) = check_celery(Celery().conf, {"CELERY_BROKER_URL": "redis://:secret@elsewhere"})
    assert finding.severity is Severity.FAULT
    assert "CELERY_BROKER_URL takes the place of KEYE_REDIS_URL" in str(finding)
    assert "secret" not in str(finding)
