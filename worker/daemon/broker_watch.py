"""Whether Redis still keeps what it is told: it may be set otherwise under workers, or be another since a failover."""

import logging
from collections.abc import Callable
from contextlib import suppress

from redis import Redis, RedisError

from keye.worker.daemon.findings import Finding, Severity
from keye.worker.daemon.preflight import check_safety
from keye.worker.periodic_thread import PeriodicThread
from keye.worker.telemetry import metrics

LONGEST_PERIOD_SECONDS = 10.0

log = logging.getLogger(__name__)


class BrokerWatch(PeriodicThread):
    """Looks several times a lease. `warn` is called with all that is wrong, whenever that changes.

    The worker goes on: what it leaves in the queue is what is lost first.
    """

    def __init__(
        self, redis: Redis, lease_seconds: float, require_durable: bool, warn: Callable[[tuple[str, ...]], None]
    ) -> None:
        super().__init__("broker-watch", min(lease_seconds / 3, LONGEST_PERIOD_SECONDS))
        self._redis = redis
        self._require_durable = require_durable
        self._warn = warn
        self._faults: dict[str, Finding] = {}

    def turn(self) -> None:
        # Of one that is away others tell.
        with suppress(RedisError):
            self._judge(list(check_safety(self._redis.info(), self._require_durable)))

    def _judge(self, findings: list[Finding]) -> None:
        before = self._faults
        self._faults = {each.subject: each for each in findings if each.severity is Severity.FAULT}
        for finding in findings:
            is_fault = finding.subject in self._faults
            metrics.UNSAFE_BROKER.labels(metrics.WORKER, finding.subject).set(is_fault)
            if is_fault and finding != before.get(finding.subject):
                log.error("while this worker runs: %s", finding)
            elif finding.subject in before and not is_fault:
                log.warning("%s: right again, %s", finding.subject, finding.found)
        if self._faults != before:
            self._warn(tuple(map(str, self._faults.values())))
