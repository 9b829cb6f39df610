"""Messages that no worker could read: finding them, and throwing them away. How one looks: `keye.config.quarantine`."""

import re
import time
from collections.abc import Iterable, Iterator

from keye.config.quarantine import QuarantinedMessage
from keye.producer.errors import MessageNotFound
from keye.producer.transport import Transport

# Redis takes other texts for ids too, some of them for a range.
_MESSAGE_ID = re.compile(r"(0|[1-9][0-9]{0,18})-(0|[1-9][0-9]{0,18})")


class Quarantine:
    """The quarantined messages of one Redis, the newest `keye.config.quarantine.MAX_MESSAGES`."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def find(self, message_id: str) -> QuarantinedMessage:
        """Raises `MessageNotFound`, for what cannot be an id too."""
        is_id = _MESSAGE_ID.fullmatch(message_id) is not None
        fields = self._transport.read_quarantined(message_id) if is_id else None
        if fields is None:
            raise MessageNotFound(message_id)
        return QuarantinedMessage.of(message_id, fields)

    def select(self, since_seconds: float | None = None) -> Iterator[QuarantinedMessage]:
        """Oldest first: those that were put there within the last `since_seconds`; read bit by bit."""
        since = 0.0 if since_seconds is None else time.time() - since_seconds
        for message_id, fields in self._transport.list_quarantined(since):
            yield QuarantinedMessage.of(message_id, fields)

    def purge(self, message_ids: Iterable[str]) -> None:
        """Forget them; passes over what is gone already."""
        self._transport.purge_quarantined([each for each in message_ids if _MESSAGE_ID.fullmatch(each)])
