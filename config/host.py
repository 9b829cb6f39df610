"""The machine we run on: what an operator may say of its device, and how what is missing there is installed.

Read also by what knows neither pydantic nor a queue.
"""

from typing import Literal

DeviceSetting = Literal["auto", "cpu", "cuda"]
PrecisionSetting = Literal["auto", "bfloat16", "float16", "float32", "int8", "int4"]
Extra = Literal["worker", "upload", "quantised", "decoders"]


def install_command(extra: Extra) -> str:
    """For people."""
    return f"pip install 'keye-worker[{extra}]'"
