"""Included in a worker, or imported, this has each decoder hold a medium for a tenth of a second: as one does that has
a core of its own, whatever this machine has.
"""

import time
from typing import Any

from keye.worker.media.decode.decoder import Decoder
from keye.worker.media.decoded import Decoded

HELD_SECONDS = 0.1

_decode = Decoder.decode


def _hold(decoder: Decoder, *args: Any) -> Decoded:
    time.sleep(HELD_SECONDS)
    return _decode(decoder, *args)


Decoder.decode = _hold  # type: ignore[method-assign]
