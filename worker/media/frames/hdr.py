"""PQ and HLG (ITU-R BT.2100) as an SDR screen shows them. Touches arrays only.

White is BT.2408's 203 cd/m2. The brightest of a pixel's three colours is compressed by the curve of BT.2390 (EETF),
the others in proportion, so hues stay and greys stay grey; what is out of BT.709's gamut is clipped.
"""

from functools import cache

import numpy as np
import numpy.typing as npt
from av.video.reformatter import ColorPrimaries, ColorTrc

TRANSFERS = (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67)

# In cd/m2. What PQ is mostly graded for, and HLG's nominal peak; what is brighter is white.
WHITE, _PEAK = 203.0, 1000.0

_SCREEN_GAMMA = 2.4  # BT.1886
_HLG_GAMMA = 1.2  # of a screen with that peak

_Floats = npt.NDArray[np.float32]

# BT.2020 to BT.709 (BT.2087), and Display P3 to it; BT.709 itself stays.
_TO_BT709: dict[int, _Floats] = {
    ColorPrimaries.BT2020: np.array(
        [[1.6605, -0.5876, -0.0729], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1188]], np.float32
    ),
    ColorPrimaries.SMPTE432: np.array(
        [[1.2249, -0.2249, 0], [-0.0420, 1.0420, 0], [-0.0196, -0.0786, 1.0982]], np.float32
    ),
    ColorPrimaries.BT709: np.eye(3, dtype=np.float32),
}
_LUMINANCE = np.array([0.2627, 0.6780, 0.0593], np.float32)  # of BT.2020's three colours


def to_sdr(codes: npt.NDArray[np.uint16], transfer: int, primaries: int) -> npt.NDArray[np.uint8]:
    """`codes` are full-range RGB [H, W, 3] of one of `TRANSFERS`; where `primaries` are none it knows, BT.2020's."""
    light = _light_of_codes(transfer)[codes]
    if transfer == ColorTrc.ARIB_STD_B67:
        light *= _PEAK * (light @ _LUMINANCE)[..., np.newaxis] ** np.float32(_HLG_GAMMA - 1)
    brightest = light.max(axis=-1)
    light *= np.interp(brightest, *_curve())[..., np.newaxis].astype(np.float32)
    seen = light @ _TO_BT709.get(primaries, _TO_BT709[ColorPrimaries.BT2020]).T
    return np.rint(255 * np.clip(seen, 0, 1) ** np.float32(1 / _SCREEN_GAMMA)).astype(np.uint8)


@cache
def _light_of_codes(transfer: int) -> _Floats:
    """Of each 16-bit code: cd/m2 of PQ, the scene's light from 0 to 1 of HLG."""
    signal = np.linspace(0, 1, 2**16)
    if transfer == ColorTrc.SMPTE2084:
        return _pq_to_light(signal).astype(np.float32)
    a = 0.17883277
    b, c = 1 - 4 * a, 0.5 - a * np.log(4 * a)
    return np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12).astype(np.float32)


@cache
def _curve() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Light in cd/m2, and by what it is multiplied to be shares of white. BT.2390-11, 5.4.1, without a black level."""
    light = np.append(_pq_to_light(np.linspace(0, 1, 2**12)[1:]), _PEAK)
    light.sort()
    signal = np.minimum(_light_to_pq(light) / _light_to_pq(_PEAK), 1)
    most = _light_to_pq(WHITE) / _light_to_pq(_PEAK)
    knee = 1.5 * most - 0.5
    t = np.maximum(signal - knee, 0) / (1 - knee)
    spline = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * most
    shown = np.where(signal < knee, signal, spline)
    return light, _pq_to_light(shown * _light_to_pq(_PEAK)) / WHITE / light


_M1, _M2 = 2610 / 16384, 2523 / 4096 * 128
_C1, _C2, _C3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32


def _pq_to_light(signal: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    root = signal ** (1 / _M2)
    return 10_000 * (np.maximum(root - _C1, 0) / (_C2 - _C3 * root)) ** (1 / _M1)


def _light_to_pq(light: npt.ArrayLike) -> npt.NDArray[np.float64]:
    root = (np.asarray(light, np.float64) / 10_000) ** _M1
    return ((_C1 + _C2 * root) / (1 + _C3 * root)) ** _M2
