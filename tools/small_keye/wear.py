"""What files and cameras do to a picture: noise, blur, lossy coding. The small Keye must see through it."""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter

Wear = Callable[[Image.Image], Image.Image]

_MAX_NOISE = 6.0  # grey levels
_MAX_BLUR = 0.8  # pixels


def draw_wear(rng: np.random.Generator) -> Wear:
    """Draws how pictures of one source are worn: about as often not at all. The frames of a video share one wear."""
    if rng.random() < 0.4:
        return lambda image: image
    gain = rng.uniform(0.93, 1.07, 3)
    noise = rng.uniform(0, _MAX_NOISE) if rng.random() < 0.4 else 0.0
    blur = rng.uniform(0.2, _MAX_BLUR) if rng.random() < 0.4 else 0.0
    quality = int(rng.integers(35, 96)) if rng.random() < 0.6 else None

    def wear(image: Image.Image) -> Image.Image:
        if blur:
            image = image.filter(ImageFilter.GaussianBlur(blur))
        pixels = np.asarray(image, np.float32) * gain
        if noise:
            pixels = pixels + rng.normal(0, noise, pixels.shape)
        image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
        return image if quality is None else _coded(image, quality)

    return wear


def _coded(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")
