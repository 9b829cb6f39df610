"""A Celery worker whose engine answers with the numbers that stand in the pixels it was shown.

All before it is real: fetching, the cache, decoders, leases, settlement. `celery -A tests.soak.numbered_worker worker`.
"""

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from keye.config.settings import Settings
from keye.worker.daemon.bootsteps import EngineStep
from keye.worker.sizing import Sizing
from keye.worker.tasks.celery_app import build_app
from tests.support.echo_worker import EchoProcessor, EchoPrompt, serve

if TYPE_CHECKING:
    from keye.worker.loading.served_model import ServedModel

# A bit of a number is a square of so many pixels; beside it stands what nobody reads, so that no two files are alike.
NUM_BITS, SIDE = 16, 8


def draw(number: int) -> Image.Image:
    """The number's bits, black and white, above as many pixels of chance."""
    bits = [255 * (number >> place & 1) for place in range(NUM_BITS)]
    shown = np.kron(np.array([bits], np.uint8), np.ones((SIDE, SIDE), np.uint8))
    chance = np.random.default_rng(number).integers(0, 256, shown.shape, np.uint8)
    return Image.fromarray(np.repeat(np.concatenate([shown, chance])[..., np.newaxis], 3, axis=2))


def read(pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> int:
    squares = pixels[:SIDE, :, 0].reshape(SIDE, NUM_BITS, SIDE).mean(axis=(0, 2))
    return sum(int(square > 127) << place for place, square in enumerate(squares))


class NumberProcessor(EchoProcessor):
    sizing = Sizing(factor=1, min_pixels=1, max_pixels=2**20)

    def prepare_media(self, images: Any, videos: Any) -> Any:
        text = " ".join(str(read(np.asarray(image.pixels))) for image in images)
        return SimpleNamespace(pixel_values=None, pixel_values_videos=None, text=text)

    def prepare_text(self, messages: list[dict[str, Any]], media: Any, thinking: str) -> EchoPrompt:
        return EchoPrompt(media.text, media.text.encode())


class NumberStep(EngineStep):
    def load(self, settings: Settings) -> "ServedModel":
        return serve(NumberProcessor())


celery_app = build_app(Settings())
celery_app.steps["worker"].add(NumberStep)
