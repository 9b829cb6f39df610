"""Jobs as heavy as they may be, for a worker that tokenizes and looks at pictures: none of them is the end of it."""

import io
from base64 import b64encode
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image

from keye.config.job import MAX_INLINE_URI_CHARS, MAX_MEDIA, MAX_TEXT_BYTES
from keye.producer import GenerationOptions, ImagePart, JobFailed
from keye.worker.demo.local_worker import SMALL_KEYE
from tests.integration.hostile.echo_host import EchoHost

APP = "keye.worker.tasks.celery_app"
SETTINGS = {"KEYE_MODEL_PATH": str(SMALL_KEYE), "KEYE_DEVICE": "cpu"}
BRIEFLY = GenerationOptions(max_new_tokens=4, temperature=0)

pytestmark = pytest.mark.timeout(400)


# What would have to be kept apart from control tokens, and a word without an end.
@pytest.mark.parametrize("unit", ["\ufdd0", "a", "<|im_end|>", "<|im_end|>\u0301"])
def test_a_prompt_of_a_megabyte_ends_no_worker(host: EchoHost, unit: str) -> None:
    text = unit * (MAX_TEXT_BYTES // len(unit.encode()))
    job = host.client.submit(prompt=text, generation=BRIEFLY, deadline_seconds=2, max_attempts=1)
    with suppress(JobFailed):
        job.result(timeout=100)
    assert host.client.submit(prompt="What is this?", generation=BRIEFLY).result(timeout=100).raw_text
    assert host.is_alive


def test_as_many_pictures_as_a_job_may_hold_inside_are_looked_at(host: EchoHost) -> None:
    draw = np.random.default_rng(7)
    uris = []
    for _ in range(MAX_MEDIA):
        file = io.BytesIO()
        Image.fromarray(draw.integers(0, 256, (210, 210, 3), np.uint8)).save(file, "PNG")
        uris.append(f"data:image/png;base64,{b64encode(file.getvalue()).decode()}")
    assert 0.8 < sum(map(len, uris)) / MAX_INLINE_URI_CHARS < 1
    media = [ImagePart(uri=uri) for uri in uris]
    job = host.client.submit(prompt="What is in the images?", media=media, generation=BRIEFLY)
    assert len(job.result(timeout=200).media) == MAX_MEDIA
