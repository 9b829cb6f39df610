"""What an operator may say about the device a model runs on and the numbers it runs in."""

from typing import Literal

DeviceSetting = Literal["auto", "cpu", "cuda"]
PrecisionSetting = Literal["auto", "bfloat16", "float16", "float32", "int8", "int4"]
