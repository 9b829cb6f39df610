"""What is no picture and no video is called what it is."""

import gzip
import io
import json
import time
import zipfile

import pytest
from PIL import Image

from keye.config.faults import Fault
from keye.config.formats import HEAD_BYTES, format_of
from keye.config.job import VideoPart
from keye.worker.media.decode.image import decode_image
from keye.worker.media.frames.video import decode_video

PROLOG = b'<?xml version="1.0" encoding="UTF-8"?>\n<!-- made by -- a > tool -->\n'
SVG_TYPE = b'<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "http://www.w3.org/svg11.dtd" [<!ENTITY a "<b>">]>\n'


def icon() -> bytes:
    file = io.BytesIO()
    Image.new("RGBA", (16, 16)).save(file, "ICO")
    return file.getvalue()


def jpeg_2000() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG2000")
    return file.getvalue()


def archive() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as packed:
        packed.writestr("a.txt", "a")
    return file.getvalue()


FILES = {
    "an SVG drawing": [
        b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        PROLOG + b"<svg\nwidth='3'>",
        b"\xef\xbb\xbf" + PROLOG + SVG_TYPE + b"<svg:svg>",
    ],
    "an HTML page": [
        b"<!DOCTYPE html>\n<title>503",
        b"\r\n<HTML><head>",
        b"<!-- cached --><!doctype HTML>",
        b'<!DOCTYPE html PUBLIC "-//W3C//DTD XHTML 1.0 Strict//EN" "x">\n<html>',
        PROLOG + b'<html xmlns="http://www.w3.org/1999/xhtml">',
    ],
    "an error message in XML, as stores send it": [
        PROLOG + b"<Error><Code>NoSuchKey</Code><Message>The specified key does not exist.</Message>",
        b"<Error><Code>AccessDenied</Code>",
    ],
    "a playlist": [
        b"#EXTM3U\n",
        PROLOG + b'<MPD xmlns="urn:mpeg:dash:schema:mpd:2011">',
        b"<SmoothStreamingMedia M='2'>",
    ],
    "XML": [PROLOG + b"<rss version='2.0'>", b"<?xml version='1.0'?>", b"<feed xmlns='a'>"],
    "JSON": [json.dumps({"error": "not found"}).encode(), b'[\n {"a": 1}]', b"{}"],
    "an icon (ICO)": [icon()],
    "JPEG 2000": [jpeg_2000()],
    "JPEG XL": [b"\xff\x0a\xfa\x1f\x41", b"\0\0\0\x0cJXL \r\n\x87\n\0\0\0\x14ftypjxl "],
    "gzip": [gzip.compress(b"<svg/>")],
    "a ZIP archive": [archive()],
    "a PDF": [b"%PDF-1.7\n"],
    "a Photoshop document": [b"8BPS\0\1" + bytes(20)],
    "PostScript": [b"%!PS-Adobe-3.0 EPSF-3.0\n"],
    "text": [b"404 page not found\n", b"export const a = 1;\n"],
}


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_medium_is_called_what_it_is(name: str) -> None:
    for content in FILES[name]:
        assert format_of(content).name == name
        with pytest.raises(Fault, match="is no image that is decoded here; it looks like") as caught:
            decode_image(io.BytesIO(content), 10**6)
        assert f"it looks like {name}. " in caught.value.message
        with pytest.raises(Fault, match="is no video") as caught:
            decode_video(io.BytesIO(content), VideoPart(uri="file:"), lambda *_: None, 10**6)  # type: ignore[arg-type]
        assert f"it looks like {name}. " in caught.value.message


def test_no_head_takes_long_to_tell() -> None:
    started = time.process_time()
    for piece in (
        b"<!---->",
        b"<?x?>",
        b" ",
        b"<!-- --> ",
        b"<!DOCTYPE a>",
        b"<!DOCTYPE [",
        b"<!--",
        b"<?",
        b"[",
        b"{",
    ):
        format_of(b"<?xml?>" + piece * (HEAD_BYTES // len(piece)))
        format_of(piece * (HEAD_BYTES // len(piece)))
    assert time.process_time() - started < 1
