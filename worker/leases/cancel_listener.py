"""One thread that hears at once of jobs being cancelled. What it misses, the next renewal of the lease finds out."""

import logging
from collections.abc import Callable

from redis import Redis
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from keye.config import keys
from keye.worker.periodic_thread import PeriodicThread

log = logging.getLogger(__name__)

LISTEN_SECONDS = 0.5
PAUSE_SECONDS = 1.0
# Once nothing has come for its health check's interval the client asks for a sign of life with every look; that none
# comes it leaves to us to notice.
MAX_UNANSWERED = 8


class CancelListener(PeriodicThread):
    """Calls `on_cancel` with the id of every job that is cancelled while it runs, whoever runs it.

    And with None whenever it begins to listen, after a lost connection too: some may have been missed.
    """

    def __init__(self, redis: Redis, on_cancel: Callable[[str | None], None]) -> None:
        super().__init__("cancel-listener", PAUSE_SECONDS)
        self._redis = redis
        self._on_cancel = on_cancel
        self._is_listening = True
        self.wake()

    def turn(self) -> None:
        """Listens until the connection breaks."""
        try:
            self._listen()
        except (RedisError, UnicodeDecodeError) as fault:
            # Once an outage, which may be long. Anybody may publish what is no text.
            if self._is_listening:
                log.warning("not listening for cancellations for a moment: %s", fault)
            self._is_listening = False

    def _listen(self) -> None:
        with self._redis.pubsub() as notices:
            notices.subscribe(keys.cancellations())
            while not self.is_stopping:
                match notices.get_message(timeout=LISTEN_SECONDS):
                    case {"type": "subscribe"}:
                        self._is_listening = True
                        self._on_cancel(None)
                    case {"type": "message", "data": job_id}:
                        self._on_cancel(job_id)
                if notices.health_check_response_counter > MAX_UNANSWERED:
                    raise RedisTimeoutError("the connection is silent")
