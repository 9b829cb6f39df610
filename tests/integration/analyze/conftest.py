"""A real Celery worker, server, engine and decoders, with a model of random weights."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from celery.contrib.testing.worker import start_worker
from PIL import Image
from pydantic import SecretStr

from keye.config.connection import connect
from keye.config.outcome import ModelIdentity, WorkerIdentity
from keye.config.settings import Settings
from keye.producer import Client
from keye.worker.engine.step_loop import Engine
from keye.worker.leases.job_lease import LeaseStore
from keye.worker.leases.renewal import LeaseRenewal
from keye.worker.media.job_media import DecoderPool, MediaCache, MediaLimits
from keye.worker.model.load import load_model
from keye.worker.results.outbox import Outbox, Spool
from keye.worker.tasks.analyze import Analyst
from keye.worker.tasks.celery_app import build_app
from keye.worker.tasks.fitness import Fitness
from keye.worker.tasks.lookahead import Lookahead
from keye.worker.tasks.probe import probe
from keye.worker.tasks.sampling import load_sampling
from keye.worker.tasks.work_clock import WorkClock
from keye.worker.tasks.workbench import Workbench
from tests.integration.analyze.plant import (
    CHECKPOINT,
    CONCURRENCY,
    LEASE_SECONDS,
    FaultyEvents,
    FaultyInbox,
    FaultyProcessor,
    FaultySettlement,
    Plant,
)
from tests.support.zoo import encode_clip, steady_times


@pytest.fixture(scope="module")
def plant(valkey_url: str, decoders: DecoderPool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plant]:
    media = tmp_path_factory.mktemp("media")
    settings = Settings(
        redis_url=SecretStr(valkey_url),
        media_roots=(media,),
        concurrency=CONCURRENCY,
        lease_seconds=LEASE_SECONDS,
        allow_https=True,
    )
    redis = connect(valkey_url)
    redis.flushall()
    processor = FaultyProcessor.from_checkpoint(CHECKPOINT)
    engine = Engine(load_model(CHECKPOINT, dtype=torch.float32, device="cpu"), processor, kv_cache_bytes=2**26)
    engine.start()
    leases = LeaseStore(redis, settings.lease_seconds)
    renewal = LeaseRenewal(leases)
    renewal.start()
    settlement = FaultySettlement(redis, settings.result_ttl_seconds, settings.dead_letter_ttl_seconds)
    bench = Workbench(
        inbox=FaultyInbox(engine.inbox),
        processor=processor,
        sampling=load_sampling(CHECKPOINT),
        media_limits=MediaLimits.of(settings),
        media_cache=MediaCache(tmp_path_factory.mktemp("cache"), max_bytes=0),
        decoders=decoders,
        lookahead=Lookahead(decoders.num_decoders),
        events=FaultyEvents(redis),
        model=ModelIdentity(name="random", model_type="Keye", precision="float32"),
        worker=WorkerIdentity(host="here", pid=1, device="cpu"),
    )
    app = build_app(settings)
    outbox = Outbox(settlement, Spool(tmp_path_factory.mktemp("spool")), leases.patience)
    fitness = Fitness(partial(probe, bench), app.admission, print)
    fitness.start()
    app.analyst = Analyst(bench, leases, renewal, settlement, outbox, WorkClock(redis, CONCURRENCY), fitness)
    with (
        start_worker(
            app, pool="threads", concurrency=CONCURRENCY, perform_ping_check=False, loglevel="warning"
        ) as worker,
        Client(settings) as client,
    ):
        yield Plant(app, bench, worker, client, redis, leases, renewal, settlement, engine, outbox, media)
    renewal.stop()
    engine.stop()
    app.close()
    redis.flushall()
    redis.close()


@pytest.fixture
def picture(plant: Plant) -> str:
    path = plant.media / "picture.png"
    Image.new("RGB", (120, 90), "teal").save(path)
    return str(path)


@pytest.fixture(scope="module")
def clip(plant: Plant) -> str:
    return str(encode_clip(plant.media / "short.mp4", steady_times(8)))
