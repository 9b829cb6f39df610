"""The atomic moves of a job in Redis, on its clock: a Lua script each, whose head names its keys and arguments.

Whatever names a key or a channel, or begins such a name, is among the KEYS: before those alone goes a client's prefix.
"""

import re
from functools import cache
from pathlib import Path

from redis import Redis
from redis.commands.core import Script

_FOLDER = Path(__file__).parent


def load_script(redis: Redis, name: str) -> Script:
    """`<name>.lua` behind what it calls of `prelude.lua`; sent on first use and again after the server forgot it."""
    return redis.register_script(_source(name))


@cache  # a backend may make a client for each request
def _source(name: str) -> str:
    script = (_FOLDER / f"{name}.lua").read_text()
    # Not all of it: Lua makes each function anew in every run, a twentieth of a claim's time together.
    for function in reversed((_FOLDER / "prelude.lua").read_text().split("\n\n")):
        if (defined := re.search(r"^local function (\w+)", function, re.MULTILINE)) and f"{defined[1]}(" in script:
            script = f"{function}\n\n{script}"
    return script
