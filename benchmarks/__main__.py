"""`make bench`: every benchmark in one run, as Markdown for docs/benchmarks.md."""

import sys

from benchmarks import decode, device_operations, engine, handover, photos, pipeline, precision, queue
from benchmarks.machine import describe_machine

BENCHMARKS = {
    "decode": decode.run,
    "photos": photos.run,
    "handover": handover.run,
    "engine": engine.run,
    "device_operations": device_operations.run,
    "pipeline": pipeline.run,
    "queue": queue.run,
    "precision": precision.run,
}

print(f"Measured on: {describe_machine()}\n")
for name in sys.argv[1:] or BENCHMARKS:
    print(BENCHMARKS[name](), flush=True)
