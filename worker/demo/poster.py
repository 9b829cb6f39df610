"""The demo's picture: every medium with its question and what the worker answered."""

from PIL import Image, ImageDraw, ImageFont

_TILE = 260
_PICTURE = 168
_MARGIN = 14
_COLUMNS = 4


def draw_poster(tiles: list[tuple[Image.Image, str, str, bool]]) -> Image.Image:
    """Lay out (picture, question, answer, is right) tiles, four in a row."""
    rows = max(1, -(-len(tiles) // _COLUMNS))
    poster = Image.new("RGB", (_COLUMNS * _TILE, rows * _TILE), "white")
    canvas = ImageDraw.Draw(poster)
    font = ImageFont.load_default(14)
    for i, (picture, question, answer, is_right) in enumerate(tiles):
        x, y = i % _COLUMNS * _TILE + _MARGIN, i // _COLUMNS * _TILE + _MARGIN
        shown = picture.resize((_PICTURE * picture.width // picture.height, _PICTURE))
        poster.paste(shown, (x, y))
        canvas.rectangle((x - 1, y - 1, x + shown.width, y + shown.height), outline="grey")
        canvas.text((x, y + _PICTURE + 8), _wrapped(question, font), fill="black", font=font)
        canvas.text((x, y + _PICTURE + 44), _wrapped(answer, font), fill="green" if is_right else "red", font=font)
    return poster


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= _TILE - 2 * _MARGIN:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)
