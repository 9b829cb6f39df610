"""Included in a worker, this has its watch call a job hung one second after its time."""

from keye.worker.daemon import watch
from keye.worker.tasks import stragglers

watch.PATIENCE_SECONDS = 1.0
stragglers.GRACE_SECONDS = 0.5
