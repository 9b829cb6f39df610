"""The one table of formats: what tells each of them, by suffix or by first bytes, and what may open it.

Producers and workers read the same rows, so that what one side announces the other decodes.
"""

import binascii
import re
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Literal, NamedTuple
from urllib.parse import unquote, urlsplit

MediaType = Literal["image", "video"]

# Enough for every pattern below.
HEAD_BYTES = 2048


class Format(NamedTuple):
    """`name` is for people, and Pillow's for an image; `demuxer` is FFmpeg's for the one that may open it as a video.

    What has no `media_type` is known only to say what somebody sent instead. A GIF is an image unless a `VideoPart`
    asks for its motion.
    """

    name: str
    begins: bytes
    media_type: MediaType | None = None
    mime: str = ""
    suffixes: tuple[str, ...] = ()
    demuxer: str | None = None


# What may come before the root element; never tried again, since there are so many ways to divide it.
_XML_PROLOG = (
    rb"(?:\xef\xbb\xbf)?(?>\s+|<\?(?:(?!\?>).)*+\?>|<!--(?:(?!-->).)*+-->"
    rb"|<!DOCTYPE\s+(?!(?i:html))[^>\[]*+(?:\[[^\]]*+\]\s*+)?>)*+"
)

# The first whose bytes match wins. Sources: the formats' own specifications, and https://mp4ra.org for the brands.
FORMATS = (
    Format("JPEG", rb"\xff\xd8\xff", "image", "image/jpeg", (".jpg", ".jpeg", ".jpe", ".jfif")),
    Format("PNG", rb"\x89PNG\r\n\x1a\n", "image", "image/png", (".png", ".apng")),
    Format("GIF", rb"GIF8[79]a", "image", "image/gif", (".gif",), demuxer="gif"),
    Format("WEBP", rb"RIFF....WEBP", "image", "image/webp", (".webp",)),
    Format("TIFF", rb"II[*+]\0|MM\0[*+]", "image", "image/tiff", (".tiff", ".tif")),
    Format("BMP", rb"BM.{4}\0\0\0\0", "image", "image/bmp", (".bmp",)),
    # Brands of the container alone (mif1, msf1, miaf) leave it to those beside them what is in it.
    Format("AVIF", rb".{4}ftyp(avi[fs]|(mif1|msf1|miaf).{4}(.{4}){0,9}avi[fs])", "image", "image/avif", (".avif",)),
    Format("HEIF", rb".{4}ftyp(he[iv][cxms]|mif[12]|msf1|miaf)", "image", "image/heic", (".heic", ".heif", ".hif")),
    Format(
        "MP4",
        rb".{4}(ftyp|styp|moov|moof|mdat|free|skip|wide|pnot)|\0[\0-\x0f]..(sidx|ssix|emsg|prft|pdin|uuid|meta|udta|mfra)",
        "video",
        "video/mp4",
        (".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2", ".f4v"),
        "mov",
    ),
    Format("Matroska or WebM", rb"\x1aE\xdf\xa3", "video", "video/webm", (".webm", ".mkv"), "matroska"),
    Format("AVI", rb"RIFF....AVI ", "video", "video/x-msvideo", (".avi",), "avi"),
    # Its packets have 188 bytes, on disks and cameras (M2TS) four more before each, in some recordings 16 after it.
    Format(
        "MPEG-TS",
        rb"\x47.{187}\x47.{187}\x47|.{4}\x47.{191}\x47.{191}\x47|\x47.{203}\x47.{203}\x47",
        "video",
        "video/mp2t",
        (".ts", ".mts", ".m2ts", ".m2t"),
        "mpegts",
    ),
    Format("MPEG-PS", rb"\0{2,1000}\x01\xba", "video", "video/mpeg", (".mpg", ".mpeg", ".vob", ".m2p"), "mpeg"),
    Format("FLV", rb"FLV\x01", "video", "video/x-flv", (".flv",), "flv"),
    # An .ogg is mostly a song, so that suffix tells nothing.
    Format("Ogg", rb"OggS", "video", "video/ogg", (".ogv",), "ogg"),
    Format("MXF", rb"\x06\x0e\x2b\x34\x02\x05\x01\x01\x0d\x01\x02", "video", "application/mxf", (".mxf",), "mxf"),
    Format("IVF", rb"DKIF\0\0", "video", "video/x-ivf", (".ivf",), "ivf"),
    # Streams without a container. They begin with what a decoder needs first, or with a mark of where pictures begin.
    Format(
        "H.264",
        rb"\0{2,8}\x01(\x09[\x10\x30\x50\x70\x90\xb0\xd0\xf0]\0{2,8}\x01)?(\x06.{1,1000}?\0\0\x01)?"
        rb"[\x27\x47\x67][\x2c\x42\x4d\x53\x56\x58\x64\x6e\x76\x7a\x80\xf4]",
        "video",
        "video/h264",
        (".h264", ".264", ".avc"),
        "h264",
    ),
    Format(
        "HEVC",
        rb"\0{2,8}\x01[\x40\x42\x46\x4e]\x01",
        "video",
        "video/h265",
        (".hevc", ".h265", ".265"),
        "hevc",
    ),
    Format("MPEG video", rb"\0{2,8}\x01\xb3", "video", "video/mpeg", (".m2v", ".m1v", ".mpv"), "mpegvideo"),
    Format(
        "MPEG-4 Visual",
        rb"\0\0\x01([\xb0\xb5]|[\0-\x1f]\0\0\x01[\x20-\x2f])",
        "video",
        "video/mp4v-es",
        (),
        "m4v",
    ),
    Format("AV1", rb"\x12\0\x0a", "video", "video/av1", (".obu",), "obu"),
    Format("WMV", rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "video", "video/x-ms-wmv", (".wmv", ".asf"), "asf"),
    # Known only to say what somebody sent instead.
    Format("an SVG drawing", _XML_PROLOG + rb"<([\w.-]+:)?svg[\s>]"),
    Format("an HTML page", _XML_PROLOG + rb"(?i:<(!doctype\s+html|html|head|body|title|meta|script|div|p|h1)\b)"),
    # Manifests make readers open further files and addresses.
    Format(
        "a playlist",
        rb"\s*(#EXTM3U|ffconcat|\[playlist\])|" + _XML_PROLOG + rb"<(MPD|SmoothStreamingMedia|smil|playlist)\b",
    ),
    Format("an error message in XML, as stores send it", _XML_PROLOG + rb"<Error\b"),
    Format("XML", _XML_PROLOG + rb"<[A-Za-z_]|<\?xml"),
    Format("JSON", rb"\s*+(\{\s*+[\"}]|\[\s*+[\[{\"\]\d])"),
    Format("an icon (ICO)", rb"\0\0[\x01\x02]\0[^\0]\0"),
    Format("JPEG 2000", rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51"),
    Format("JPEG XL", rb"\0\0\0\x0cJXL \r\n\x87\n|\xff\x0a"),
    Format("a Photoshop document", rb"8BPS\0[\x01\x02]"),
    Format("PostScript", rb"%!PS|\xc5\xd0\xd3\xc6"),
    Format("a picture of floats (HDR or EXR)", rb"#\?RADIANCE|#\?RGBE|\x76\x2f\x31\x01"),
    Format("a Netpbm picture", rb"P[1-7]\s"),
    Format("QOI", rb"qoif"),
    Format("a DirectDraw surface", rb"DDS "),
    Format("a camera's raw picture", rb"IIR[OS]|MMOR|IIU\0|FUJIFILMCCD-RAW|FOVb|.{4}ftypcrx "),
    Format("a DICOM picture", rb".{128}DICM"),
    Format("sound", rb"RIFF....WAVE|ID3|fLaC|\xff[\xf2\xf3\xfa\xfb]|FORM....AIF"),
    Format("a PDF", rb"%PDF"),
    Format("a ZIP archive", rb"PK(\x03\x04|\x05\x06)"),
    Format("gzip", rb"\x1f\x8b"),
    Format("an archive", rb"BZh[1-9]1AY&SY|\xfd7zXZ\0|\x28\xb5\x2f\xfd|7z\xbc\xaf\x27\x1c|Rar!\x1a\x07|.{257}ustar"),
    Format("a pointer of Git LFS, not the file itself", rb"version https://git-lfs"),
    Format("text", rb"[\t\n\r\x20-\x7e]+\Z"),
    # Broken off a recording: it does not start on a packet.
    Format(
        "MPEG-TS",
        rb".{1,1400}?(\x47.{187}\x47.{187}\x47.{187}\x47|\x47.{191}\x47.{191}\x47.{191}\x47)",
        "video",
        "video/mp2t",
        demuxer="mpegts",
    ),
    Format("something unknown", b""),  # matches whatever is left
)

# Up to its bytes, of one that holds them in base64.
BASE64_INLINE = re.compile(r"data:[^,]*; *base64[\t\n\f\r ]*,", re.IGNORECASE)
_BASE64_SPACE = b"\t\n\f\r "
_SEXTETS = re.compile(rb"[A-Za-z0-9+/]*+")
# `unquote_to_bytes` takes thirty times as long over those that stand for nothing.
_PERCENT_ENCODED = re.compile(rb"%([0-9A-Fa-f]{2})")

_BY_SUFFIX = {suffix: row.media_type for row in FORMATS for suffix in row.suffixes}
_ALSO_TYPESCRIPT = (".ts", ".mts")
_SAID: dict[str, MediaType] = {"image/": "image", "video/": "video"}


def format_of(content: bytes) -> Format:
    """What a file is whose first bytes, or all of whose bytes, these are. Names that callers give are not believed."""
    head = content[:HEAD_BYTES]
    return next(row for row in FORMATS if re.match(row.begins, head, re.DOTALL))


def format_of_file(file: BinaryIO) -> Format:
    """As `format_of`; leaves the seekable `file` at its start."""
    head = file.read(HEAD_BYTES)
    file.seek(0)
    return format_of(head)


def media_type_of(uri: str) -> MediaType | None:
    """`s3://bucket/cat.jpg` is an image, `/clips/1.mp4` a video; None where a VideoPart or an ImagePart must tell.

    The bytes of a `data:` URI are believed before what it says of itself. A file of this machine is looked at only
    where its suffix does not tell.
    """
    if uri[:5].lower() == "data:":
        return format_of(_inline_head(uri)).media_type or _SAID.get(uri[5:11].lower())
    suffix = PurePosixPath(uri.partition("?")[0]).suffix.lower()
    media_type = _BY_SUFFIX.get(suffix)
    if media_type is not None and suffix not in _ALSO_TYPESCRIPT:
        return media_type
    head = _local_head(uri)
    return media_type if head is None else format_of(head).media_type


def read_inline(uri: str) -> bytes:
    """The bytes of a `data:` URI, as browsers read them. Raises `ValueError` with a sentence that lacks its subject.

    Source: WHATWG's Fetch ("data: URL processor"), URL (which drops tabs and line breaks, and what follows a #), and
    Infra ("forgiving-base64 decode").
    """
    kind, comma, _ = uri.partition(",")
    if not comma:
        raise ValueError("has no comma between its type and its bytes.")
    try:
        content = _inline_content(uri[len(kind) + 1 :])
    except UnicodeEncodeError:
        raise ValueError("holds what is no text.") from None
    if not BASE64_INLINE.match(uri):
        return content
    sextets = content.translate(None, _BASE64_SPACE)
    if len(sextets) % 4 == 0:
        sextets = sextets[:-2] + sextets[-2:].rstrip(b"=")
    if len(sextets) % 4 == 1 or not _SEXTETS.fullmatch(sextets):
        raise ValueError("its bytes are not valid base64.")
    return binascii.a2b_base64(sextets + b"=" * (-len(sextets) % 4))


def _inline_content(payload: str) -> bytes:
    content = payload.partition("#")[0].encode().translate(None, b"\t\n\r")
    return _PERCENT_ENCODED.sub(lambda byte: bytes.fromhex(byte[1].decode()), content)


def _inline_head(uri: str) -> bytes:
    kind, _, payload = uri.partition(",")
    payload = payload[: 16 * HEAD_BYTES]
    if BASE64_INLINE.match(uri):
        sextets = _inline_content(payload.encode(errors="replace").decode()).translate(None, _BASE64_SPACE)
        payload = sextets[: -(-HEAD_BYTES // 3) * 4].decode(errors="replace")
    try:
        return read_inline(f"{kind},{payload}")
    except ValueError:
        return b""


def _local_head(uri: str) -> bytes | None:
    if not uri.startswith(("/", "file:")):
        return None
    try:
        path = Path(uri if uri.startswith("/") else unquote(urlsplit(uri).path))
        # A pipe would keep us waiting.
        if not path.is_file():
            return None
        with path.open("rb") as file:
            return file.read(HEAD_BYTES)
    except (OSError, ValueError):
        return None
