"""kombu's Redis transport with our door in it: what it takes from a list or hears on a channel is read by us first.

It connects as our own clients do, and so do Celery's results.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from celery.backends.redis import RedisBackend
from kombu.transport import TRANSPORT_ALIASES, redis, virtual
from kombu.utils.json import dumps
from redis import ConnectionPool
from redis.exceptions import ConnectionError as RedisConnectionError

from keye.config.connection import CELERY_DEFAULTS
from keye.config.job import Priority
from keye.config.redis_url import RedisUrl
from keye.config.topology import PRIORITY_STEPS, QUEUE, message_list
from keye.worker.broker.envelope import Unreadable
from keye.worker.broker.remote_commands import read_command

log = logging.getLogger(__name__)

# Among a taken message's properties, once its job is settled.
IS_ACKNOWLEDGED = "is_acknowledged"
COMMANDS, REPLIES = b".celery.pidbox", b".reply.celery.pidbox"
STEPS = {step: priority for priority, step in PRIORITY_STEPS.items()}


class QoS(redis.QoS):
    """What has been taken and not acknowledged, noted in Redis for other workers."""

    def can_consume(self) -> bool:
        """While the door is closed only what was asked for before: a message may be in the answer."""
        admission, num_taken = self.channel.admission, len(self._delivered) - len(self._dirty)
        is_asked = not self.channel.active_queues or bool(self.channel._in_poll)
        return (is_asked or admission.takes_more(num_taken)) and super().can_consume()

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """What goes back is the next to be taken: kombu would put it behind all that wait."""
        if requeue:
            self.restore_by_tag(delivery_tag)
            virtual.QoS.ack(self, delivery_tag)
        else:
            super().reject(delivery_tag, requeue)

    @contextmanager
    def pipe_or_acquire(self, pipe: Any = None, client: Any = None) -> Iterator[Any]:
        """Two commands in one packet, without the transaction that kombu puts around them and that costs more than they
        do. Of a server that dies between the two a note stays behind that restores nothing."""
        if pipe:
            yield pipe
        else:
            with self.channel.conn_or_acquire(client) as client:
                yield client.pipeline(transaction=False)

    def restore_unacked(self, client: Any = None) -> None:
        """Not by a connection that is lost and closed: Celery asks once more, and the worker would end of it.

        What it has taken comes back when its time is up.
        """
        if self.channel.connection.client is not None:
            super().restore_unacked(client)

    def ack(self, delivery_tag: str) -> None:
        message = self._delivered.get(delivery_tag)
        if message is not None and message.properties.get(IS_ACKNOWLEDGED):
            # What is left is to make room for the next.
            virtual.QoS.ack(self, delivery_tag)
        else:
            super().ack(delivery_tag)


class Channel(redis.Channel):
    QoS = QoS
    # Options of the transport, so that each app has its own.
    from_transport_options = (  # type: ignore[assignment]
        *redis.Channel.from_transport_options,
        *("admission", "redis_url"),
    )

    admission: Any = None
    redis_url: RedisUrl
    _writing: Any = None

    def _get_pool(self, asynchronous: bool = False) -> ConnectionPool:
        """Not by kombu's reading of a URL, which verifies no certificate and knows neither our options nor Sentinel."""
        self.keyprefix_fanout = self.keyprefix_fanout.format(db=self.redis_url.db)
        channel = self

        class Polled(self.redis_url.connection_class):  # type: ignore[name-defined]
            # kombu subscribes once, and would wait for ever on another connection in its place.
            is_kept = True

            def disconnect(self, *args: Any, **kwargs: Any) -> None:
                super().disconnect(*args, **kwargs)
                if channel._registered:
                    channel._on_connection_disconnect(self)

        return _pool_of(self.redis_url, self.max_connections, Polled if asynchronous else None)

    def _brpop_start(self, timeout: int | None = None) -> None:
        if self.client.connection.is_outdated():
            # Celery begins anew, with this connection and the one that listens.
            raise RedisConnectionError("another server is the primary by now")
        super()._brpop_start(timeout)

    def _create_client(self, asynchronous: bool = False) -> Any:
        if asynchronous:
            client = super()._create_client(asynchronous)
            # The client that takes messages, and the last place at which they are bytes.
            client.set_response_callback("BRPOP", self._admit)
            return client
        # kombu makes one for all that it writes, three a message, which is a tenth of what the message costs.
        if self._writing is None or self._writing.connection_pool is not self.pool:
            self._writing = super()._create_client()
        return self._writing

    def _admit(self, popped: Any, **_: Any) -> Any:
        """None, as if nothing had come, for a message that Celery is not to see."""
        if not popped:
            return None
        name, raw = popped
        if name.endswith(REPLIES):
            # To who asks by `celery inspect` with this app.
            return popped
        admitted = self.admission(raw)
        return None if admitted is None else (name, admitted)

    def _do_restore_message(
        self, payload: Any, exchange: Any, routing_key: Any, pipe: Any, leftmost: bool = False
    ) -> None:
        """Ours go back to meet the door again: a worker of an older release may have taken them unread."""
        if routing_key != QUEUE:
            super()._do_restore_message(payload, exchange, routing_key, pipe, leftmost)
            return
        self.admission.note_record(payload)
        priority = Priority.NORMAL
        match payload:
            case {"properties": {"priority": int(step)}}:
                priority = STEPS.get(step, Priority.NORMAL)
        (pipe.lpush if leftmost else pipe.rpush)(message_list(priority), dumps(payload))

    def _handle_message(self, client: Any, response: Any) -> Any:
        """What was heard; without what Celery is not to see, as if nothing had been said."""
        heard = super()._handle_message(client, response)
        if isinstance(heard["data"], bytes) and heard["channel"].endswith(COMMANDS):
            try:
                heard["data"] = read_command(heard["data"])
            except Unreadable as fault:
                log.warning("a remote command is ignored: %s", fault)
                heard["data"] = None
        return heard


class Transport(redis.Transport):
    Channel = Channel
    # kombu's URL is for logs alone, and has no secrets.
    can_parse_url = True

    def as_uri(self, uri: str, include_password: bool = False, mask: str = "**") -> str:
        return uri


class ResultBackend(RedisBackend):
    """Where Celery keeps how far the parts of a chord are; results are written by our settlement."""

    def _get_pool(self, **_: Any) -> ConnectionPool:
        return _pool_of(self.app.conf.broker_transport_options["redis_url"], self.max_connections)


def _pool_of(url: RedisUrl, max_connections: int, connection_class: type | None = None) -> ConnectionPool:
    options = url.connection_options(**CELERY_DEFAULTS)
    chosen = connection_class or url.connection_class
    return ConnectionPool(connection_class=chosen, max_connections=max_connections, **options)


# The scheme under which logs show it, in the place of redis.
SCHEME = "keye-redis"
TRANSPORT_ALIASES[SCHEME] = f"{__name__}:{Transport.__name__}"
