"""kombu's Redis transport with our door in it: what it takes from a list or hears on a channel is read by us first."""

import logging
from queue import Empty
from typing import Any

from kombu.transport import TRANSPORT_ALIASES, redis
from kombu.utils.json import dumps

from config.job import Priority
from config.topology import PRIORITY_STEPS, QUEUE, message_list
from worker.broker.envelope import Unreadable
from worker.broker.remote_commands import read_command

log = logging.getLogger(__name__)

STEPS = {step: priority for priority, step in PRIORITY_STEPS.items()}


class Channel(redis.Channel):
    # An option of the transport, so that each app has its own.
    from_transport_options = (*redis.Channel.from_transport_options, "admission")  # type: ignore[assignment]

    admission: Any = None

    def _create_client(self, asynchronous: bool = False) -> Any:
        client = super()._create_client(asynchronous)
        if asynchronous:
            # The client that takes messages, and the last place at which they are bytes.
            client.set_response_callback("BRPOP", self._admit)
        return client

    def _admit(self, popped: Any, **_: Any) -> Any:
        """None, as if nothing had come, for a message that Celery is not to see."""
        if not popped:
            return None
        name, raw = popped
        admitted = self.admission(raw)
        return None if admitted is None else (name, admitted)

    def _do_restore_message(
        self, payload: Any, exchange: Any, routing_key: Any, pipe: Any, leftmost: bool = False
    ) -> None:
        """Ours go back as they are, to meet the door again: a worker of an older release may have taken them unread."""
        if routing_key == QUEUE:
            match payload:
                case {"properties": {"priority": int(step)}} if step in STEPS:
                    priority = STEPS[step]
                case _:
                    priority = Priority.NORMAL
            (pipe.lpush if leftmost else pipe.rpush)(message_list(priority), dumps(payload))
        else:
            super()._do_restore_message(payload, exchange, routing_key, pipe, leftmost)

    def _receive_one(self, client: Any) -> Any:
        try:
            return super()._receive_one(client)
        except RecursionError:
            log.warning("a remote command is ignored: nested too deeply")
            raise Empty from None

    def _deliver_fanout_message(self, message: Any, exchange: str) -> bool:
        try:
            read_command(message)
        except Unreadable as fault:
            log.warning("a remote command is ignored: %s", fault)
            return True
        return bool(super()._deliver_fanout_message(message, exchange))


class Transport(redis.Transport):
    Channel = Channel


# The scheme under which logs show it, in the place of redis.
SCHEME = "keye-redis"
TRANSPORT_ALIASES[SCHEME] = f"{__name__}:{Transport.__name__}"
