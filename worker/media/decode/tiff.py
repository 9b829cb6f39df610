"""TIFFs whose samples Pillow refuses or reads as something else, and TIFFs without the tags that bear on no pixel.

What a strip or a tile holds is left to libtiff: a file that says it is grey, of 8 bits and as wide as its rows have
bytes, comes out as those bytes. Source of the tags: TIFF 6.0 (Adobe, 1992) and its technical notes.
"""

import io
import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image

from keye.worker.media.faults import corrupt, unsupported
from keye.worker.sizing import Size

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _ORIENTATION = 256, 257, 258, 259, 262, 274
_STRIPS, _STRIP_BYTES, _SAMPLES, _ROWS_A_STRIP, _PLANAR, _PREDICTOR = 273, 279, 277, 278, 284, 317
_TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_BYTES, _EXTRA_SAMPLES, _SAMPLE_FORMAT = 322, 323, 324, 325, 338, 339
_BEAR_ON_PIXELS = {
    *(_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, 266, _STRIPS, _ORIENTATION, _SAMPLES, _ROWS_A_STRIP),
    *(_STRIP_BYTES, _PLANAR, 292, 293, _PREDICTOR, 320, _TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_BYTES, 332),
    *(_EXTRA_SAMPLES, _SAMPLE_FORMAT, 347, *range(512, 522), 529, 530, 531, 532),
}
_DEFAULTS: dict[int, tuple[int, ...]] = {
    _BITS: (1,),
    _COMPRESSION: (1,),
    _PHOTOMETRIC: (0,),
    _ORIENTATION: (1,),
    _SAMPLES: (1,),
    _PLANAR: (1,),
}
_DEFAULTS |= {_PREDICTOR: (1,), _SAMPLE_FORMAT: (1,), _EXTRA_SAMPLES: ()}

# None, LZW, Deflate twice, PackBits, LZMA, Zstandard: those that hold bytes, whatever these stand for.
_OF_BYTES = (1, 5, 8, 32946, 32773, 34925, 50000)
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB = 0, 1, 2
_UNSIGNED, _SIGNED, _FLOAT = 1, 2, 3
_PREMULTIPLIED, _UNASSOCIATED = 1, 2
# By a tag's type: how `struct` reads one value.
_VALUES = {1: "B", 3: "H", 4: "I", 16: "Q"}
# Rows converted at once, so that what is as wide as 64 bits a sample is never there as a whole.
_BLOCK_BYTES = 2**24


class Tiff:
    """The first picture's tags, of a seekable `file`. Raises `struct.error` or `KeyError` where one is missing."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._num_bytes = file.seek(0, io.SEEK_END)
        head = self._read(0, 4)
        self._order = "<" if head[:1] == b"I" else ">"
        self._is_big = 43 in head
        self._count, self._offset = ("Q", "Q") if self._is_big else ("H", "I")
        (at,) = self._unpack(self._offset, 8 if self._is_big else 4)
        (num_entries,) = self._unpack(self._count, at)
        self._entry = f"HH{self._offset}"
        size, at = self._size(self._entry) + self._size(self._offset), at + self._size(self._count)
        self._entries: dict[int, bytes] = {}
        folder = self._read(at, min(num_entries, 4096) * size)
        self._folder_at = at - self._size(self._count)
        for start in range(0, len(folder) // size * size, size):
            entry = folder[start : start + size]
            self._entries.setdefault(struct.unpack_from(self._order + "H", entry)[0], entry)

    def __getitem__(self, tag: int) -> tuple[int, ...]:
        if tag not in self._entries:
            return _DEFAULTS[tag]
        entry = self._entries[tag]
        _, kind, num_values = struct.unpack_from(self._order + self._entry, entry)
        values = f"{num_values}{_VALUES[kind]}"
        if num_values > self._num_bytes:
            raise struct.error(f"{num_values} values")
        in_entry = entry[self._size(self._entry) :]
        if self._size(values) <= len(in_entry):
            return struct.unpack_from(self._order + values, in_entry)
        (at,) = struct.unpack(self._order + self._offset, in_entry)
        return self._unpack(values, at)

    def _unpack(self, values: str, at: int) -> tuple[int, ...]:
        return struct.unpack(self._order + values, self._read(at, self._size(values)))

    def _read(self, at: int, num_bytes: int) -> bytes:
        self._file.seek(min(at, self._num_bytes))
        return self._file.read(num_bytes)

    def _size(self, values: str) -> int:
        return struct.calcsize(self._order + values)

    def bare(self, changed: dict[int, tuple[int, ...]] | None = None) -> bytes:
        """The file with nothing but the tags that bear on pixels, and some of those `changed`."""
        content = self._read(0, self._num_bytes)
        entries = {tag: entry for tag, entry in self._entries.items() if tag in _BEAR_ON_PIXELS}
        at, behind = self._num_bytes, b""
        for tag, values in (changed or {}).items():
            packed = struct.pack(f"{self._order}{len(values)}{self._offset}", *values)
            kind, room = (16, 8) if self._is_big else (4, 4)
            if len(packed) > room:
                packed, behind, at = struct.pack(self._order + self._offset, at), behind + packed, at + len(packed)
            entries[tag] = struct.pack(self._order + self._entry, tag, kind, len(values)) + packed
        entries = dict(sorted(entries.items()))
        folder = struct.pack(self._order + self._count, len(entries)) + b"".join(entries.values())
        folder += bytes(self._size(self._offset))
        if not changed:
            # Where it was: what is put behind a file that is cut off would be read in place of its pixels.
            return content[: self._folder_at] + folder + content[self._folder_at + len(folder) :]
        head = content[: 8 if self._is_big else 4] + struct.pack(self._order + self._offset, at)
        return head + content[len(head) :] + behind + folder

    @property
    def size(self) -> Size:
        return self[_HEIGHT][0], self[_WIDTH][0]

    @property
    def is_plain(self) -> bool:
        """Whether its samples lie in the file as they are."""
        return self[_COMPRESSION][0] == 1

    @property
    def share_cut(self) -> float:
        """How many of its strips or tiles do not end within the file."""
        offsets, sizes = (_TILES, _TILE_BYTES) if _TILES in self._entries else (_STRIPS, _STRIP_BYTES)
        try:
            ends = [offset + size for offset, size in zip(self[offsets], self[sizes], strict=True)]
        except (KeyError, ValueError, struct.error):
            return 0.0  # for the reader to say
        return sum(end > self._num_bytes for end in ends) / max(len(ends), 1)

    @property
    def orientation(self) -> int:
        return self[_ORIENTATION][0]

    @property
    def is_odd(self) -> bool:
        """Whether its samples are to be read here."""
        try:
            photometric, num_samples = self[_PHOTOMETRIC][0], self[_SAMPLES][0]
            # Some say more of them than there are samples.
            bits = set(self[_BITS][:num_samples])
            sample_format, extra, are_apart = self[_SAMPLE_FORMAT][0], self[_EXTRA_SAMPLES], self[_PLANAR][0] == 2
            if self[_COMPRESSION][0] not in _OF_BYTES or photometric > _RGB:
                return False
        except (KeyError, IndexError, struct.error):
            return False
        if photometric == _RGB:
            is_usual = num_samples == 3 or (num_samples == 4 and _PREMULTIPLIED not in extra and not are_apart)
        else:
            is_usual = num_samples == 1
        if bits <= {1, 2, 4, 8}:
            return not is_usual or (photometric == _RGB and bits != {8})
        is_plain = bits == {16} and sample_format == _UNSIGNED and photometric != _WHITE_IS_ZERO and not are_apart
        return not (is_plain and is_usual)

    def read_odd(self) -> Image.Image:
        """RGB on white, as stored. Integers of all their bits, and fractions from 0 to 1, are from black to white."""
        if self.share_cut:
            raise corrupt("is a TIFF that was cut off. Send an undamaged file.")
        height, width = self.size
        samples = _Samples(self[_BITS][0], self[_SAMPLE_FORMAT][0], self._order)
        num_samples, photometric = self[_SAMPLES][0], self[_PHOTOMETRIC][0]
        num_colours = 3 if photometric == _RGB else 1
        if (
            len(set(self[_BITS][:num_samples])) > 1
            or len(set(self[_SAMPLE_FORMAT][:num_samples])) > 1
            or not num_colours <= num_samples <= 64
        ):
            raise unsupported("is a TIFF whose samples are not all of one kind. Send it as PNG or JPEG.")
        alpha_kind = dict(enumerate(self[_EXTRA_SAMPLES], num_colours))
        alpha_at = next((at for at, kind in alpha_kind.items() if kind in (_PREMULTIPLIED, _UNASSOCIATED)), None)
        if alpha_at is not None and alpha_at >= num_samples:
            alpha_at = None
        are_apart = self[_PLANAR][0] == 2 and num_samples > 1
        wanted = [*range(num_colours), *([] if alpha_at is None else [alpha_at])]
        if are_apart:
            planes = [self._rows_of(samples, 1, plane, num_samples) for plane in wanted]
        else:
            planes = [self._rows_of(samples, num_samples, 0, 1)]
        rgb = np.empty((height, width, 3), np.uint8)
        num_rows = max(1, _BLOCK_BYTES // (width * num_samples * 8))
        for top in range(0, height, num_rows):
            rows = [plane(top, top + num_rows) for plane in planes]
            block = np.concatenate(rows, axis=2) if are_apart else rows[0][..., wanted]
            colours = block[..., :num_colours]
            if photometric == _WHITE_IS_ZERO:
                colours = 1 - colours
            if alpha_at is not None:
                alpha = block[..., num_colours:]
                colours = colours if alpha_kind[alpha_at] == _PREMULTIPLIED else colours * alpha
                colours = colours + (1 - alpha)
            rgb[top : top + num_rows] = (colours.clip(0, 1) * 255).round()
        return Image.fromarray(rgb)

    def _rows_of(
        self, samples: "_Samples", num_samples: int, plane: int, num_planes: int
    ) -> Callable[[int, int], npt.NDArray[np.float64]]:
        """Rows from one to another, [rows, W, num_samples], of a plane of the picture."""
        height, width = self.size
        is_tiled = _TILES in self._entries
        part_width = self[_TILE_WIDTH][0] if is_tiled else width
        num_parts = ceil(width / max(part_width, 1))
        part_bytes = samples.num_bytes(part_width * num_samples)
        changed: dict[int, tuple[int, ...]] = {
            _WIDTH: (num_parts * part_bytes,),
            _HEIGHT: (height,),
            _BITS: (8,),
            _SAMPLES: (1,),
            _PLANAR: (1,),
        }
        changed |= {_PHOTOMETRIC: (1,), _PREDICTOR: (1,), _SAMPLE_FORMAT: (1,), _ORIENTATION: (1,)}
        if is_tiled:
            changed[_TILE_WIDTH] = (part_bytes,)
        if num_planes > 1:
            for tag in (_TILES, _TILE_BYTES) if is_tiled else (_STRIPS, _STRIP_BYTES):
                of_all = self[tag]
                of_one = len(of_all) // num_planes
                changed[tag] = of_all[plane * of_one : (plane + 1) * of_one]
        bare = Tiff(io.BytesIO(self.bare(changed)))
        bare._entries.pop(_EXTRA_SAMPLES, None)
        if num_parts * part_bytes * height > 16 * 2**30:
            raise MemoryError
        with Image.open(io.BytesIO(bare.bare()), formats=["TIFF"]) as image:
            stored = np.asarray(image)
        predictor = self[_PREDICTOR][0]

        def read(top: int, bottom: int) -> npt.NDArray[np.float64]:
            parts = stored[top:bottom].reshape(-1, num_parts, part_bytes)
            values = samples.read(parts, part_width, num_samples, predictor)
            return values.reshape(len(parts), num_parts * part_width, num_samples)[:, :width]

        return read


@dataclass(frozen=True)
class _Samples:
    """`bits` each, of a `form` of TIFF's, in the byte `order` of `struct`. Raises a fault for those not read here."""

    bits: int
    form: int
    order: str

    def __post_init__(self) -> None:
        is_whole = self.bits in (8, 16, 32, 64)
        is_read = is_whole and self.bits > 8 if self.form == _FLOAT else is_whole or (self.bits < 17)
        if not (self.bits > 0 and is_read and self.form in (_UNSIGNED, _SIGNED, _FLOAT)):
            raise unsupported(f"is a TIFF of {self.bits}-bit samples of a rare kind. Send it as PNG or JPEG.")

    def num_bytes(self, num_values: int) -> int:
        return ceil(num_values * self.bits / 8)

    def read(
        self, parts: npt.NDArray[np.uint8], width: int, num_samples: int, predictor: int
    ) -> npt.NDArray[np.float64]:
        """The bytes of rows of strips or tiles [..., bytes] as [..., width, num_samples], from 0 to 1."""
        shape = (*parts.shape[:-1], width, num_samples)
        if self.bits not in (8, 16, 32, 64):
            of_each = np.unpackbits(parts, axis=-1)[..., : width * num_samples * self.bits]
            values = of_each.reshape(*shape, self.bits) @ (1 << np.arange(self.bits)[::-1])
            return self._in_range(values)
        num_bytes = self.bits // 8
        if predictor == 3:
            # Floats, their bytes apart, the highest first, and each the difference from the one before.
            apart = parts.reshape(*parts.shape[:-1], -1, num_samples).cumsum(axis=-2, dtype=np.uint8)
            together = apart.reshape(*parts.shape[:-1], num_bytes, -1).swapaxes(-1, -2)
            values = np.ascontiguousarray(together).view(f">f{num_bytes}").reshape(shape)
        else:
            letter = {_UNSIGNED: "u", _SIGNED: "i", _FLOAT: "f"}[self.form] if predictor == 1 else "u"
            values = np.ascontiguousarray(parts).view(f"{self.order}{letter}{num_bytes}").reshape(shape)
            if predictor == 2:
                values = values.cumsum(axis=-2, dtype=f"u{num_bytes}")
                values = values.view(f"{'if'[self.form == _FLOAT]}{num_bytes}") if self.form > 1 else values
        return self._in_range(values)

    def _in_range(self, values: npt.NDArray[np.generic]) -> npt.NDArray[np.float64]:
        if self.form == _FLOAT:
            return np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=1.0, neginf=0.0)
        # All programs read signed bytes as unsigned ones; of more bits, ImageMagick gives their whole range.
        least = -(2 ** (self.bits - 1)) if self.form == _SIGNED and self.bits > 8 else 0
        if self.form == _SIGNED and self.bits == 8:
            values = values.view(np.uint8)
        return (values.astype(np.float64) - least) / (2**self.bits - 1)
