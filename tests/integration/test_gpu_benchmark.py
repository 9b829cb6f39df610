"""`python -m benchmarks.gpu` on the CPU with a tiny model, and without anything that its machine may lack."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ABSENT = ["av", "boto3", "botocore", "celery", "kombu", "pydantic", "pydantic_settings", "redis", "torchao"]


def test_gpu_benchmark_needs_torch_transformers_numpy_and_pillow_only() -> None:
    code = (
        "import runpy, sys\n"
        f"sys.modules.update(dict.fromkeys({ABSENT!r}))\n"
        "sys.argv = ['benchmarks.gpu', '--tiny']\n"
        "runpy.run_module('benchmarks.gpu', run_name='__main__')\n"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stderr
    for row in ("fused attention", "batches of 8", "engine, 2 jobs", "engine, 4 jobs", "decoding step, 4 jobs"):
        assert row in run.stdout
    assert "Without a row for 8 bits: KEYE_PRECISION=int8 needs torchao" in run.stdout
    assert "Roofline" in run.stdout
