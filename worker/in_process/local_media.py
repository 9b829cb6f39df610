"""Media of jobs that run on the host of who asks: files are read where they lie."""

import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from keye.config.formats import Format
from keye.producer.medium import OpenFile
from keye.producer.upload import Media


class LocalMedia(Media):
    """Files are read where they lie; what has none is put into one of `folder`, whatever its size."""

    def __init__(self, folder: Path) -> None:
        super().__init__(None)
        self._folder = folder
        self._contents: list[tuple[Path, OpenFile]] = []

    def _look(self, given: Any) -> str | OpenFile:
        # Of this disk, as all paths are.
        return super()._look(Path(given) if isinstance(given, str) and given.startswith("/") else given)

    def _uri_of(self, file: OpenFile, found: Format, place: str) -> str:
        if file.path is not None:
            path = Path(os.path.realpath(file.path))
            # No URI holds bytes that are no text, but by their numbers.
            return str(path) if str(path).isprintable() else path.as_uri()
        path = self._folder / f"{uuid.uuid4().hex}{found.suffixes[0]}"
        self._contents.append((path, file))
        return str(path)

    def upload(self) -> None:
        for path, file in self._contents:
            file.seek(0)
            with path.open("wb") as copy:
                shutil.copyfileobj(file, copy)
