"""Good files of every kind, and seeded ways to spoil them."""

import io
import random
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from tests.support.zoo import draw_quarters, encode_clip, steady_times

PICTURES = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
CLIPS = {
    "h264.mp4": "libx264",
    "h264.ts": "libx264",
    "hevc.mkv": "libx265",
    "vp9.webm": "libvpx-vp9",
    "av1.mp4": "libsvtav1",
    "mpeg4.avi": "mpeg4",
}


def make_good_files(folder: Path) -> dict[str, bytes]:
    good = {}
    for kind in PICTURES:
        file = io.BytesIO()
        Image.fromarray(draw_quarters(256, 384)).save(file, kind)
        good[f"picture.{kind.lower()}"] = file.getvalue()
    for name, codec in CLIPS.items():
        good[name] = encode_clip(folder / name, steady_times(48), codec).read_bytes()
    return good


def spoil(good: dict[str, bytes], number: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """`number` names and contents: every kind of file, every kind of damage, in turn."""
    chance = random.Random(seed)
    names = sorted(good)
    for index in range(number):
        name = names[index % len(names)]
        damage = DAMAGES[index // len(names) % len(DAMAGES)]
        stem, _, suffix = name.partition(".")
        yield f"{index:03}-{stem}-{damage.__name__}.{suffix}", damage(bytearray(good[name]), good, chance)


def overwrite_some(content: bytearray, good: dict[str, bytes], chance: random.Random) -> bytes:
    for _ in range(chance.randint(1, 200)):
        content[chance.randrange(len(content))] = chance.randrange(256)
    return bytes(content)


def cut_off(content: bytearray, good: dict[str, bytes], chance: random.Random) -> bytes:
    return bytes(content[: chance.randrange(len(content))])


def spoil_the_head(content: bytearray, good: dict[str, bytes], chance: random.Random) -> bytes:
    """Past the first bytes, which tell what the file is, so that its reader takes it up."""
    for _ in range(chance.randint(1, 12)):
        content[chance.randrange(12, min(400, len(content)))] ^= 1 << chance.randrange(8)
    return bytes(content)


def splice(content: bytearray, good: dict[str, bytes], chance: random.Random) -> bytes:
    other = good[chance.choice(sorted(good))]
    at, start = chance.randrange(len(content)), chance.randrange(len(other))
    content[at : at + chance.randrange(2000)] = other[start : start + chance.randrange(2000)]
    return bytes(content)


def blank_a_stretch(content: bytearray, good: dict[str, bytes], chance: random.Random) -> bytes:
    at = chance.randrange(len(content))
    length = min(chance.randrange(1, 4096), len(content) - at)
    content[at : at + length] = bytes([chance.choice((0, 255))]) * length
    return bytes(content)


def repeat_a_stretch(content: bytearray, good: dict[str, bytes], chance: random.Random) -> bytes:
    at = chance.randrange(len(content))
    return bytes(content[:at] + content[max(0, at - 3000) :])


DAMAGES = (overwrite_some, cut_off, spoil_the_head, splice, blank_a_stretch, repeat_a_stretch)
