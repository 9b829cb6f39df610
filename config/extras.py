"""How the optional packages of this project are installed."""

from typing import Literal

Extra = Literal["worker", "upload", "quantised", "decoders"]


def install_command(extra: Extra) -> str:
    """For people; the project is in no package index."""
    return f"pip install -e '.[{extra}]' in the project's folder"
