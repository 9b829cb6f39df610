"""How much of a file is known, and whether it still is what it was."""

import zlib
from typing import BinaryIO, NamedTuple

_BYTES_AT_A_TIME = 2**20
# Of a file that could not be written.
ONCE_IT_CAN = "Once it can be, begin this again: it goes on where it was."


class Written(NamedTuple):
    """The first `size` bytes of a file, by their CRC-32."""

    size: int = 0
    checksum: int = 0

    def and_then(self, text: bytes) -> "Written":
        return Written(self.size + len(text), zlib.crc32(text, self.checksum))

    @classmethod
    def read(cls, file: BinaryIO, size: int) -> "Written":
        """So many bytes from here on, or as many as there are."""
        written = cls()
        while written.size < size and (part := file.read(min(size - written.size, _BYTES_AT_A_TIME))):
            written = written.and_then(part)
        return written
