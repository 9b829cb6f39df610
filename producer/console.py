"""Tables and colours in a terminal, of text that others may have written."""

import sys
from collections.abc import Iterable
from typing import TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from keye.config.terminal import has_styles, unguarded, visible


class OurConsole(Console):
    """Its own control sequences pass the guard of the terminal by; so whatever it shows is made visible here."""

    def __init__(self, stream: TextIO | None = None) -> None:
        """On standard output, where no other is given."""
        stream = stream or sys.stdout
        super().__init__(file=unguarded(stream), color_system="auto" if has_styles(stream) else None)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible(segment.text))
