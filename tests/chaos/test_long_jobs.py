"""Nothing fails: jobs outlast every timeout there is, on workers whose clocks may differ, and run once."""

import sys
from collections.abc import Callable

import pytest

from keye.config.codes import Stage
from keye.config.event import StageStarted
from keye.producer import Client, Job
from tests.chaos.broker import Broker
from tests.chaos.conftest import Gate
from tests.chaos.echo_workers import EchoWorkers
from tests.chaos.ledger import attempts_of, wait_for_all
from tests.support.scale import SCALE

# Of the lease; a third is where a worker refuses to start.
SKEW = 0.25

AllIsWell = Callable[[list[Job]], None]


@pytest.mark.holds(
    "docs/reliability.md#the-chaos-tests",
    "nothing, but jobs of 7",
)
def test_jobs_longer_than_every_timeout_start_once_even_where_clocks_differ(
    broker: Broker, client: Client, workers: EchoWorkers, assert_all_is_well: AllIsWell, gate: Gate
) -> None:
    skew_seconds = SKEW * SCALE.lease_seconds
    skews = {}
    for skew in (-skew_seconds, 0.0, skew_seconds):
        worker = workers.start(within=(sys.executable, "-m", "tests.chaos.skewed_clock", str(skew)))
        skews[worker.pid] = skew
    for worker in workers.started:
        worker.wait_until_ready()
    jobs = [client.submit(prompt=f"wait {SCALE.longest_job_seconds}") for _ in range(24)]
    wait_for_all(broker.redis, jobs, within_seconds=SCALE.longest_job_seconds + 30)

    extra_starts = sum(attempts_of(broker.redis, jobs)) - len(jobs)
    gate(
        f"24 jobs of {SCALE.longest_job_seconds:g} s at lease {SCALE.lease_seconds:g} s on three workers, "
        f"one clock right, one {skew_seconds:g} s slow, one as much fast",
        f"{extra_starts} extra starts",
        "0 extra starts",
    )
    aheads = {job.result(timeout=1).worker.pid: _clock_ahead(job) for job in jobs}
    assert aheads == pytest.approx(skews, abs=skew_seconds / 2)
    assert extra_starts == 0
    assert_all_is_well(jobs)


def _clock_ahead(job: Job) -> float:
    """Seconds between the server's clock, which tells when the job was claimed, and its worker's, a moment later."""
    told = {event.stage: event.at for event in job.events(timeout=1) if isinstance(event, StageStarted)}
    return told[Stage.PREPARE] - told[Stage.OPEN]
