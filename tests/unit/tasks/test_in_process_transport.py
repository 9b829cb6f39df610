"""The queue of a process: who begins its jobs, and who reads what becomes of them, wait side by side."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from keye.worker.in_process.transport import InProcessTransport


def test_it_closes_while_somebody_reads(tmp_path: Path) -> None:
    transport = InProcessTransport(tmp_path)
    is_waiting = threading.Event()

    def read() -> None:
        with transport._changed:
            is_waiting.set()
            transport.read({"of a job": "0"}, 1, 30)

    threading.Thread(target=read, daemon=True).start()
    is_waiting.wait()
    bench: Any = SimpleNamespace(lookahead=SimpleNamespace(wake=None))
    # Its thread waits behind the reader.
    transport.start(bench)
    closing = threading.Thread(target=transport.close, daemon=True)
    closing.start()
    closing.join(10)
    assert not closing.is_alive()
