"""Every picture of Pillow's source archive through the decoders, beside Pillow's own reading; by `make corpus`.

Where the two part, `accepted.toml` has the picture's name and why. What stands there and is so no longer is red too.
"""

import os
import tomllib
from collections import Counter
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageOps

from keye.config.codes import ErrorCode
from keye.config.faults import Fault
from keye.config.formats import FORMATS
from keye.config.job import ImagePart
from keye.config.settings import Settings
from keye.worker.media.job_media import DecodedImage, DecoderPool, MediaCache, MediaLimits, decode, fetch
from keye.worker.sizing import Sizing

FOLDER = os.environ.get("CORPUS")
ACCEPTED = Path(__file__).parent / "accepted.toml"
AS_IT_IS = Sizing(factor=1, min_pixels=1, max_pixels=2**30)
# MPO is Pillow's word for a JPEG that others follow.
READ_HERE = {row.name for row in FORMATS if row.media_type == "image"} | {"MPO"}
OF_THE_FILE = {ErrorCode.MEDIA_CORRUPT, ErrorCode.MEDIA_UNSUPPORTED, ErrorCode.MEDIA_TOO_LARGE}

Pixels = npt.NDArray[np.uint8]


def read_by_pillow(path: Path) -> tuple[str | None, Pixels | None]:
    """The format; the first picture upright, on white [H, W, 3]. None where Pillow refuses it."""
    name = None
    try:
        with Image.open(path) as image:
            if (name := image.format) not in READ_HERE:
                return name, None
            upright = ImageOps.exif_transpose(image)
        if upright.has_transparency_data:
            rgba = upright.convert("RGBA")
            upright = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        return name, np.asarray(upright.convert("RGB"))
    except Exception:
        return name, None


def read_here(path: Path, limits: MediaLimits, cache: MediaCache, decoders: DecoderPool) -> Pixels | Fault:
    parts = [ImagePart(uri=str(path))]
    try:
        (decoded,) = decode(parts, fetch(parts, limits, cache), limits, AS_IT_IS, decoders)
    except Fault as fault:
        return fault
    assert isinstance(decoded, DecodedImage)
    return np.asarray(decoded.pixels)


def compare(ours: Pixels | Fault, name: str | None, theirs: Pixels | None) -> str:
    """How a picture was read here, beside how Pillow read it."""
    if isinstance(ours, Fault):
        # Of one that crashed, hung up or was killed the decoder is told.
        assert ours.code in OF_THE_FILE, ours
        assert "its decoder" not in ours.message, ours
        if name in READ_HERE or name is None:
            return "refused by both" if theirs is None else "refused"
        return "not read here" if ours.code is ErrorCode.MEDIA_UNSUPPORTED else f"{ours.code} for {name}"
    if theirs is None:
        return "read"
    return "equal" if np.array_equal(ours, theirs) else "otherwise"


@pytest.mark.skipif(not FOLDER, reason="compares with the pictures of Pillow's source archive, by `make corpus`")
@pytest.mark.timeout(1800)
# Of Pillow, of pictures that are there to be warned of.
@pytest.mark.filterwarnings("ignore")
def test_each_picture_of_pillow_is_read_as_pillow_reads_it_or_listed(decoders: DecoderPool, tmp_path: Path) -> None:
    folder = Path(str(FOLDER)).resolve()
    limits, cache = MediaLimits.of(Settings(media_roots=(folder,))), MediaCache(tmp_path / "cache", 2**20)
    ways = {
        str(path.relative_to(folder)): compare(read_here(path, limits, cache, decoders), *read_by_pillow(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    print(f"\n{len(ways):,} files:", ", ".join(f"{number:,} {way}" for way, number in Counter(ways.values()).items()))
    accepted = {
        name: way
        for way, groups in tomllib.loads(ACCEPTED.read_text()).items()
        for group in groups
        for name in group["pictures"]
    }
    as_pillow = ("equal", "refused by both", "not read here")
    assert {name: way for name, way in ways.items() if way not in as_pillow} == accepted
    assert "equal" in ways.values()
