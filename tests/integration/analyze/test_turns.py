"""A job that waits after a death, for a decoder or for room in the engine says so in its record, until it begins."""

import os
import signal
from typing import Any

import pytest

from keye.config import keys
from keye.config.wire import seal
from keye.producer import Job
from keye.worker.engine.step_plan import StepLimits
from keye.worker.leases.claims import Requeued
from keye.worker.results.event_writer import EventWriter
from keye.worker.tasks import attempt, isolation, turn
from tests.integration.analyze.plant import Plant, a_dead_worker, a_job, briefly, endlessly, generating
from tests.support.conditions import eventually
from tests.support.decoder_children import children_of


def have_room_for_one(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    # As configured, too: from limits that are below that it recovers after some steps.
    for limits in ("now", "_configured"):
        monkeypatch.setattr(plant.engine._limits, limits, StepLimits(max_running=1))


def waits(plant: Plant, job: Job) -> bool:
    record = plant.record(job.id)
    return "waits" in record and record["waits"] == record["attempts"]


def test_a_job_without_room_in_the_engine_waits_until_there_is(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    have_room_for_one(plant, monkeypatch)
    first = plant.client.submit(prompt="what?", generation=endlessly())
    eventually(lambda: generating(plant, first.id))
    second = plant.client.submit(prompt="what?", generation=endlessly())
    eventually(lambda: waits(plant, second) and not waits(plant, first))
    first.cancel()
    eventually(lambda: not waits(plant, second))
    assert second.progress.state == "RUNNING"
    second.cancel()
    # The engine has room again for whoever comes next.
    assert [plant.fail(job).code for job in (first, second)] == ["CANCELLED", "CANCELLED"]


def test_a_job_that_is_over_while_it_waits_ends(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    have_room_for_one(plant, monkeypatch)
    first = plant.client.submit(prompt="what?", generation=endlessly())
    eventually(lambda: generating(plant, first.id))
    cancelled, late = (plant.client.submit(prompt="?", deadline_seconds=seconds) for seconds in (600, 2))
    eventually(lambda: waits(plant, cancelled))
    cancelled.cancel()
    assert [plant.fail(job).code for job in (cancelled, late)] == ["CANCELLED", "DEADLINE_EXCEEDED"]
    first.cancel()
    assert plant.fail(first).code == "CANCELLED"


def test_a_job_whose_worker_died_once_waits_for_its_place_and_is_ended_there(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolation, "MAX_COMPANY", 1)

    def submit(**options: Any) -> Job:
        """One whose worker has died."""
        sealed = seal(a_job(**options))
        dead, _ = a_dead_worker(plant, sealed)
        eventually(lambda: sealed.job_id in dead.due(keys.LEASES, 10))
        requeued = dead.reap(sealed.job_id, "reaper")
        assert isinstance(requeued, Requeued)
        dead.publish(requeued)
        return plant.client.find(sealed.job_id)

    first = submit(generation=endlessly())
    eventually(lambda: generating(plant, first.id) and not waits(plant, first))
    cancelled, late = submit(), submit(deadline_seconds=3)
    eventually(lambda: waits(plant, cancelled))
    assert "company" in {each.phase for each in plant.bench.lookahead.attempts()}
    assert plant.finish(plant.client.submit(a_job())).attempts == 1, "whose worker never died waits for none of them"
    cancelled.cancel()
    assert [plant.fail(job).code for job in (cancelled, late)] == ["CANCELLED", "DEADLINE_EXCEEDED"]
    last = submit()
    first.cancel()
    assert plant.finish(last).attempts == 2
    assert plant.fail(first).code == "CANCELLED"


def test_a_job_waits_while_none_of_its_media_is_in_a_decoder(plant: Plant, picture: str) -> None:
    decoders = children_of(os.getpid())
    for decoder in decoders:
        os.kill(decoder, signal.SIGSTOP)
    try:
        jobs = [
            plant.client.submit(prompt="what?", media=[picture] * num_media, generation=briefly())
            for num_media in (2, 1, 3)
        ]
        eventually(lambda: [job for job in jobs if waits(plant, job)])
        # Whoever got the decoders waits for nothing but them.
        assert not all(waits(plant, job) for job in jobs)
    finally:
        for decoder in decoders:
            os.kill(decoder, signal.SIGCONT)
    for job in jobs:
        plant.finish(job)
        assert not waits(plant, job)


def test_a_job_that_finds_room_at_once_writes_nothing_of_it(
    plant: Plant, picture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    for module in (attempt, turn):
        # However busy this machine is.
        monkeypatch.setattr(module, "BRIEF_WAIT_SECONDS", 20)
    monkeypatch.setattr(EventWriter, "write_waits", lambda *_: written.append(_))
    for media in ([], [picture]):
        plant.finish(plant.client.submit(prompt="what?", media=media, generation=briefly(max_new_tokens=200)))
    assert written == []
