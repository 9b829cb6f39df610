"""Pictures nobody drew for us: photographs, scans and odd formats go through a real worker."""

from pathlib import Path

import pytest
import skimage

from keye.config.outcome import JobResult
from keye.producer import Client
from tests.acceptance.conftest import Start

FOLDER = Path(skimage.data_dir)
# Its TIFFs are volumes of 64-bit numbers, which are no pictures to Pillow.
FORMATS = (".png", ".jpg", ".gif")


def test_photographs_of_all_kinds_are_answered_by_one_worker(start: Start, redis_url: str) -> None:
    paths = sorted(path for path in FOLDER.iterdir() if path.suffix in FORMATS)
    if len(paths) < 10:
        pytest.fail(f"scikit-image ships only {len(paths)} pictures in {FOLDER}")
    worker = start("keye.worker.daemon.cli", "run", KEYE_MEDIA_ROOTS=str(FOLDER))
    with Client(redis_url) as client:
        jobs = [
            client.submit(
                media=[{"type": "image", "uri": str(path)}],
                prompt="What is in the image?",
                generation={"max_new_tokens": 8},
            )
            for path in paths
        ]
        results = [job.result(timeout=60) for job in jobs]
    assert all(isinstance(result, JobResult) and result.usage.visual_tokens > 0 for result in results)
    worker.ask_to_end()
    assert worker.exit_code() == 0
