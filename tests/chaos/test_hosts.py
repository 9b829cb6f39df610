"""Two worker hosts and a broker host on a network of their own: one is cut off past the lease, and comes back."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from pydantic import SecretStr

from keye.config.outcome import JobResult
from keye.config.settings import Settings
from keye.producer import Client, Job
from tests.chaos.conftest import Gate
from tests.chaos.echo_workers import EchoWorkers
from tests.chaos.hosts import Host, Network
from tests.chaos.ledger import assert_each_succeeded_once, assert_nothing_is_left, outcome_of, wait_for_all, workers_of
from tests.support.conditions import eventually
from tests.support.scale import SCALE

can_make_hosts = (
    os.geteuid() == 0
    and all(shutil.which(command) for command in ("ip", "unshare"))
    and subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode == 0
)


@pytest.mark.holds(
    "docs/reliability.md#the-chaos-tests",
    "a host cut off from",
)
@pytest.mark.skipif(not can_make_hosts, reason="network namespaces need root, `ip` and leave to make them")
def test_a_host_that_is_cut_off_loses_its_jobs_to_the_other_and_takes_new_ones_when_it_is_back(
    tmp_path: Path, lease_seconds: float, gate: Gate
) -> None:
    with Network(tmp_path) as network:
        workers = EchoWorkers(network.url, network.redis, tmp_path, lease_seconds)
        try:
            _cut_off_and_connect_again(network, workers, lease_seconds, gate)
        finally:
            workers.end()


def _cut_off_and_connect_again(network: Network, workers: EchoWorkers, lease_seconds: float, gate: Gate) -> None:
    with Client(Settings(redis_url=SecretStr(network.url), lease_seconds=lease_seconds)) as client:
        far = workers.start(url=network.a.url, within=network.a.within)
        near = workers.start(url=network.b.url, within=network.b.within)
        far.wait_until_ready()
        near.wait_until_ready()
        # So that the far one takes all of them.
        near.freeze()
        eventually(lambda: not _waits_for_messages(network, network.b), within_seconds=5)
        # They end there while it is cut off, after the other has taken them.
        jobs = [client.submit(prompt=f"wait {lease_seconds * 1.5}") for _ in range(8)]
        far.wait_until_holding(8)
        near.thaw()

        network.a.cut_off()
        cut_off_at = time.monotonic()
        near.wait_until_holding(8, within_seconds=SCALE.restart_seconds)
        took = time.monotonic() - cut_off_at
        gate("a host cut off with 8 jobs: they run on the other after", f"{took:.1f} s", f"{SCALE.restart_seconds:g} s")
        wait_for_all(network.redis, jobs, within_seconds=3 * lease_seconds)
        time.sleep(max(0.0, cut_off_at + SCALE.cut_off_seconds - time.monotonic()))
        network.a.connect_again()
        back_at = time.monotonic()
        away_seconds = back_at - cut_off_at
        eventually(lambda: far.log.count("lease lost") == 8, within_seconds=35)

        # More and more, until the near one has no room for them.
        after: list[Job] = []

        def is_far_at_work() -> bool:
            after.append(client.submit(prompt="wait 1"))
            return far.name in workers_of(network.redis, after)

        eventually(is_far_at_work, within_seconds=35)
        gate(
            f"the same host, back after {away_seconds:.0f} s: late results discarded, jobs taken after",
            f"8 of 8, {time.monotonic() - back_at:.1f} s",
            "8 of 8, 35 s",
        )
        wait_for_all(network.redis, after, within_seconds=60)

        outcomes = [outcome_of(network.redis, job) for job in jobs]
        assert {o.worker.pid for o in outcomes if isinstance(o, JobResult)} == {near.pid}
        assert_each_succeeded_once(network.redis, [*jobs, *after])
        assert_nothing_is_left(client, network.redis, lease_seconds)


def _waits_for_messages(network: Network, host: Host) -> bool:
    blocked = (client["addr"] for client in network.redis.client_list() if "b" in client["flags"])
    return any(address.startswith(f"{host.address}:") for address in blocked)
