"""How the worker's Celery app is set up, whoever starts it."""

import subprocess
import sys

from pydantic import SecretStr

from keye.config.settings import Settings
from keye.worker.tasks.celery_app import build_app


def test_message_outlives_its_worker_as_long_as_the_lease() -> None:
    app = build_app(Settings(redis_url=SecretStr("redis://somewhere:1/2"), lease_seconds=12, concurrency=5))
    assert app.conf.broker_transport_options["visibility_timeout"] == 12
    assert app.conf.worker_pool == "threads"
    assert app.conf.worker_concurrency == 5
    assert app.conf.broker_url == "redis://somewhere:1/2"


def test_importing_the_app_and_its_task_loads_no_torch() -> None:
    """Celery imports them before it says anything; a wrong command line must not take seconds to be told."""
    code = (
        "import sys, keye.worker.tasks.celery_app, keye.worker.tasks.analyze;"
        "sys.exit({'torch', 'transformers', 'keye.worker.daemon'} & sys.modules.keys() or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
