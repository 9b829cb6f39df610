"""Hearing of cancellations, through a proxy that can fall silent."""

from queue import Empty, SimpleQueue

import pytest
from redis import Redis

from keye.config import keys
from keye.worker.leases import renewal
from keye.worker.leases.renewal import CancelListener
from tests.support.redis_login import at_port
from tests.support.silent_proxy import SilentProxy


def test_a_silent_connection_is_replaced_and_a_quiet_one_is_not(
    redis: Redis, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A tenth of a worker's times.
    monkeypatch.setattr(renewal, "LISTEN_SECONDS", 0.1)
    port = redis.connection_pool.connection_kwargs["port"]
    heard: SimpleQueue[str | None] = SimpleQueue()
    with (
        SilentProxy(port) as proxy,
        Redis.from_url(at_port(redis_url, proxy.port), decode_responses=True, health_check_interval=1) as client,
    ):
        listener = CancelListener(client, heard.put)
        listener.start()
        assert heard.get(timeout=30) is None  # it has begun to listen
        with pytest.raises(Empty):
            heard.get(timeout=2.5)
        redis.publish(keys.CANCELLATIONS, "one")
        assert heard.get(timeout=30) == "one"

        assert proxy.fall_silent() == 1
        redis.publish(keys.CANCELLATIONS, "missed")
        assert heard.get(timeout=30) is None  # it has begun anew: whatever it missed is looked for
        redis.publish(keys.CANCELLATIONS, "two")
        assert heard.get(timeout=30) == "two"
        listener.stop()
