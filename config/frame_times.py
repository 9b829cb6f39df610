"""When the frames that were read are shown, packed into a few characters: exactly, or rounded by a step that is told.

Packed times are `STEP FIRST LAST`, or `STEP FIRST LAST LEAST REST`, with one space between them:

- STEP is a fraction of a second, such as `1/30` or `1001/30000`, in which the others count. Behind a `~` it is what
  times are rounded to; without, they are the file's own.
- FIRST and LAST are times. Those between are evenly spread, without a `~` each rounded down to a step, and then moved:
- REST is base64 of zlib's form (RFC 4648, RFC 1950) of how many steps more each time is moved than the one before it,
  above LEAST: unsigned numbers of equally many bytes, first the lowest byte of all, then the next of all, and so on.

`1/30 0 450`, of 31 frames, is 0, 0.5, 1 s and so on: a clip of 30 frames a second, read at two.
"""

import zlib
from base64 import b64decode, b64encode
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import cache
from itertools import accumulate, pairwise
from math import gcd

# Of all media of a result together.
MAX_CHARS = 2048

# Up to beyond all that times can be, which are below 2**63 seconds: rounded to that all are 0.
_STEPS = [Fraction(digit * 10**power, 10**6) for power in range(26) for digit in (1, 2, 5)]
# No number has more bytes: a tick is no less than 2**-31 seconds.
_MAX_WIDTH = 16


def pack_all(clips: Sequence[tuple[Sequence[int], Fraction]]) -> list[str]:
    """For each clip its times, in ticks of so many seconds: exact, or rounded where all would be over `MAX_CHARS`.

    The step is the finest of 1, 2 and 5 times a power of ten, from a microsecond on, with which all fit. What is
    shorter as it is stays exact.
    """
    exact = [_pack_exactly(ticks, tick) for ticks, tick in clips]
    if sum(map(len, exact)) <= MAX_CHARS:
        return exact

    @cache
    def rounded(step: Fraction) -> list[str]:
        told = (_pack_rounded(ticks, tick, step) for ticks, tick in clips)
        return [min(pair, key=len) for pair in zip(exact, told, strict=True)]

    return rounded(_STEPS[bisect_left(_STEPS, True, key=lambda step: sum(map(len, rounded(step))) <= MAX_CHARS)])


def unpack(packed: str, num_frames: int) -> tuple[float, ...]:
    """Seconds. Raises `ValueError` for what is no packed times of so many frames."""
    step, first, last, *rest = packed.removeprefix("~").split(" ")
    spread, gaps = _spread(int(first), int(last), num_frames)
    moved = _unpack_moved(rest, gaps) if rest else [0] * num_frames
    if not packed.startswith("~"):
        spread = [gaps * (time // gaps) for time in spread]
    numerator, denominator = map(int, step.split("/"))
    return tuple((time + by * gaps) * numerator / (denominator * gaps) for time, by in zip(spread, moved, strict=True))


def _pack_exactly(ticks: Sequence[int], tick: Fraction) -> str:
    common = gcd(*ticks) or 1
    times = [time // common for time in ticks]
    spread, gaps = _spread(times[0], times[-1], len(times))
    moved = [time - even // gaps for time, even in zip(times, spread, strict=True)]
    return _join(tick * common, times, moved)


def _pack_rounded(ticks: Sequence[int], tick: Fraction, step: Fraction) -> str:
    over, under = (tick / step).as_integer_ratio()
    times = [_divided(time * over, under) for time in ticks]
    spread, gaps = _spread(times[0], times[-1], len(times))
    moved = [
        _divided(time * over * gaps - even * under, under * gaps) for time, even in zip(ticks, spread, strict=True)
    ]
    return f"~{_join(step, times, moved)}"


def _join(step: Fraction, times: Sequence[int], moved: Sequence[int]) -> str:
    head = f"{step.numerator}/{step.denominator} {times[0]} {times[-1]}"
    if not any(moved):
        return head
    more = [later - earlier for earlier, later in pairwise(moved)]
    least = min(more)
    width = ((max(more) - least).bit_length() + 7) // 8
    numbers = b"".join((each - least).to_bytes(width, "little") for each in more)
    planes = b"".join(numbers[place::width] for place in range(width))
    return f"{head} {least} {b64encode(zlib.compress(planes, 9)).decode()}"


def _unpack_moved(least_and_rest: Sequence[str], num_gaps: int) -> Iterable[int]:
    least, rest = least_and_rest
    try:
        planes = zlib.decompressobj().decompress(b64decode(rest, validate=True), _MAX_WIDTH * num_gaps)
    except zlib.error as error:
        raise ValueError(str(error)) from None
    if not planes or len(planes) % num_gaps:
        raise ValueError(f"{len(planes)} bytes for {num_gaps} numbers")
    more = (int.from_bytes(planes[place::num_gaps], "little") + int(least) for place in range(num_gaps))
    return accumulate(more, initial=0)


def _spread(first: int, last: int, number: int) -> tuple[list[int], int]:
    """So many times from first to last, in steps times the number of gaps, and that number."""
    gaps = max(number - 1, 1)
    return [first * gaps + place * (last - first) for place in range(number)], gaps


def _divided(over: int, under: int) -> int:
    return (2 * over + under) // (2 * under)
