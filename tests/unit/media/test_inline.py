"""`data:` URIs are read as browsers read them."""

import base64
import io
import time
from contextlib import suppress

import pytest
from PIL import Image

from keye.config.formats import media_type_of, read_inline
from keye.worker.media.decode.image import decode_image
from keye.worker.media.fetch.local import open_inline
from tests.support.zoo import draw_quarters, read_quarters

_file = io.BytesIO()
Image.fromarray(draw_quarters()).save(_file, "PNG")
PAYLOAD = base64.b64encode(_file.getvalue()).decode()

AS_BROWSERS_READ_IT = {
    "line breaks": "data:image/png;base64," + "\r\n".join(PAYLOAD[at : at + 76] for at in range(0, len(PAYLOAD), 76)),
    "trailing newline": f"data:image/png;base64,{PAYLOAD}\n",
    "spaces and tabs": "data:image/png;base64, " + "\t ".join(PAYLOAD),
    "no padding": f"data:image/png;base64,{PAYLOAD.rstrip('=')}",
    "encoded padding": f"data:image/png;base64,{PAYLOAD.replace('=', '%3D')}",
    "encoded letters": "data:image/png;base64," + "".join(f"%{ord(letter):02X}" for letter in PAYLOAD),
    "space after semicolon": f"data:image/png; base64,{PAYLOAD}",
    "space before comma": f"data:image/png;base64 ,{PAYLOAD}",
    "capitals": f"DATA:IMAGE/PNG;BASE64,{PAYLOAD}",
    "other parameters": f"data:image/png;name=a.png;charset=utf-8;base64,{PAYLOAD}",
    "no type": f"data:;base64,{PAYLOAD}",
    "a fragment": f"data:image/png;base64,{PAYLOAD}#top",
}
AS_BROWSERS_READ_IT["encoded line breaks"] = "data:image/png;base64," + "%0D%0a".join(
    PAYLOAD[at : at + 9] for at in range(0, len(PAYLOAD), 9)
)


@pytest.mark.holds("docs/operations.md#which-media-does-a-worker-read", "They are read as browsers read them")
@pytest.mark.parametrize("how", AS_BROWSERS_READ_IT)
def test_inline_bytes_are_read_as_browsers_read_them(how: str) -> None:
    uri = AS_BROWSERS_READ_IT[how]
    assert media_type_of(uri.replace("image/png", "application/octet-stream")) == "image"
    with open_inline(uri, 10**6) as file:
        assert file.read() == _file.getvalue()
        file.seek(0)
        assert read_quarters(decode_image(file, 10**6).pixels) == ["red", "green", "blue", "yellow"]


@pytest.mark.parametrize(
    "payload", ["A", "AAAAA", "AAA=A", "=", "AA===", "AAAA=", "A-_A", "AAAA\u00e9", "AA\x0bAA", "AAAA==", "AA%3"]
)
def test_base64_that_no_browser_reads_is_refused(payload: str) -> None:
    with pytest.raises(ValueError, match="not valid base64"):
        read_inline(f"data:image/png;base64,{payload}")


def test_reading_inline_bytes_takes_a_time_that_grows_with_them_alone() -> None:
    started = time.process_time()
    for payload in ("%" * 10**6, "%0A" * 10**6, "A \n" * 10**6, "=" * 10**6, ";" * 10**6, "; " * 10**6):
        for start in ("data:;base64,", "data:", "data:,"):
            media_type_of(start + payload)
            with suppress(ValueError):
                read_inline(start + payload)
    assert time.process_time() - started < 10


def test_text_of_an_inline_medium_is_read_too() -> None:
    assert read_inline("data:,a%20b%0a\n c%zz#d") == b"a b\n c%zz"
    assert read_inline("data:text/plain;base64x,AAAA") == b"AAAA"
