"""Finds the template a checkpoint writes conversations with. No torch, so that checks of a folder can ask too."""

import json
from pathlib import Path

IMAGE_PAD = "<|image_pad|>"


def load_chat_template(path: Path | str) -> str:
    """The first template of the folder that can write an image; a tokenizer's own is often the text model's.

    Raises `ValueError` when there is none.
    """
    folder = Path(path)
    for name in ("chat_template.json", "chat_template.jinja", "tokenizer_config.json"):
        file = folder / name
        if not file.is_file():
            continue
        text = file.read_text(encoding="utf-8")
        template = text if file.suffix == ".jinja" else json.loads(text).get("chat_template")
        if isinstance(template, str) and IMAGE_PAD in template:
            return template
    raise ValueError(
        f"no chat template in {folder} writes {IMAGE_PAD}; chat_template.json is missing or the text model's"
    )
