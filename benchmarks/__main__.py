"""`make bench`: every benchmark in one run, as Markdown for docs/benchmarks.md; with names, those, `real_size` too."""

import argparse

from benchmarks import (
    ahead,
    answers,
    auto_content,
    batch,
    decode,
    device_operations,
    drain,
    engine,
    handover,
    in_process,
    isolation,
    photos,
    pipeline,
    precision,
    queue,
    real_size,
    waiting,
)
from benchmarks.machine import describe_machine

BENCHMARKS = {
    "ahead": ahead.run,
    "decode": decode.run,
    "auto_content": auto_content.run,
    "photos": photos.run,
    "handover": handover.run,
    "isolation": isolation.run,
    "engine": engine.run,
    "device_operations": device_operations.run,
    "pipeline": pipeline.run,
    "in_process": in_process.run,
    "answers": answers.run,
    "queue": queue.run,
    "batch": batch.run,
    "drain": drain.run,
    "waiting": waiting.run,
    "precision": precision.run,
}

parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
parser.add_argument("names", nargs="*", default=list(BENCHMARKS))
parser.add_argument("--layers", type=int, default=36, help="of the checkpoint that real_size makes")
parser.add_argument("--precision", action="append", choices=real_size.PRECISIONS, help="of real_size; all by default")
asked = parser.parse_args()

print(f"Measured on: {describe_machine()}\n", flush=True)
for name in asked.names:
    if name == "real_size":  # only by its name: it writes 17 GB and takes minutes
        for line in real_size.run(asked.layers, asked.precision or real_size.PRECISIONS):
            print(line, flush=True)
    else:
        print(BENCHMARKS[name](), flush=True)
