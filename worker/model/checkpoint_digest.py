"""One number for a folder of weights, cheap enough to be told with every answer. No torch."""

import hashlib
import os
from pathlib import Path

_SUFFIXES = (".json", ".txt", ".jinja", ".safetensors")
_WHOLE_BYTES = 16 * 2**20
_STRIDE_BYTES, _SAMPLE_BYTES = 2**20, 4 * 2**10


def digest_checkpoint(folder: Path) -> str:
    """SHA-256 (hexadecimal) over the names, the sizes and the bytes of all that a model may be made of.

    Of a file of over 16 MiB only the first MiB and the first 4 KiB of each MiB behind it count, which of 17 GB takes a
    second or less right after they were loaded. So folders that differ in a whole matrix differ here; a few numbers
    that were changed between two samples do not show.
    """
    digest = hashlib.sha256()
    for path in sorted(each for each in folder.iterdir() if each.suffix in _SUFFIXES and each.is_file()):
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(f"{path.name}\0{size}\0".encode(errors="surrogateescape"))
            head = _WHOLE_BYTES if size <= _WHOLE_BYTES else _STRIDE_BYTES
            # Else the kernel reads ahead, in the end all of the file.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            digest.update(os.pread(file.fileno(), head, 0))
            for start in range(head, size, _STRIDE_BYTES):
                digest.update(os.pread(file.fileno(), _SAMPLE_BYTES, start))
    return digest.hexdigest()
