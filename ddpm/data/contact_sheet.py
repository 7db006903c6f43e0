"""A contact sheet: rows of small images under headings, each with a caption, for eyes and print."""

import importlib.util
import unicodedata
from functools import cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont, ImageOps

CELL = 112  # pixels, as all of these
GAP = 8
MARGIN = 24
TITLE = 30
HEADING = 44
CAPTION = 16
COLUMNS = 10
INK = "#222222"
PALE = "#777777"


class Cell(NamedTuple):
    """An image, or a text in its place, a caption, and the colour of a line that marks a group."""

    picture: Image.Image | str
    caption: str = ""
    colour: str = ""


def draw_sheet(title, sections):
    """The PIL image of a sheet of (heading, cells); sections without cells are left out."""
    large, middle, small = map(load_font, (22, 15, 11))
    sections = [(heading, cells) for heading, cells in sections if cells]
    steps = [CELL + GAP + CAPTION * any(cell.caption for cell in cells) for _, cells in sections]
    tops = [MARGIN + TITLE]
    for (_, cells), step in zip(sections, steps, strict=True):
        tops.append(tops[-1] + HEADING + -(-len(cells) // COLUMNS) * step)
    width = 2 * MARGIN + COLUMNS * (CELL + GAP) - GAP
    page = Image.new("RGB", (width, tops[-1] + MARGIN), "#FFFFFF")
    pen = ImageDraw.Draw(page)
    pen.text((MARGIN, MARGIN), ellipsize(title, large, width - 2 * MARGIN), INK, large)
    for (heading, cells), step, top in zip(sections, steps, tops[:-1], strict=True):
        text = ellipsize(heading, middle, width - 2 * MARGIN)
        pen.text((MARGIN, top + 16), text, INK, middle)
        for number, cell in enumerate(cells):
            row, column = divmod(number, COLUMNS)
            corner = MARGIN + column * (CELL + GAP), top + HEADING + row * step
            draw_cell(page, pen, cell, *corner, small)
    return page


def draw_cell(page, pen, cell, left, top, font):
    """Draw a cell with its upper left corner at (left, top)."""
    if isinstance(cell.picture, str):
        pen.rectangle((left, top, left + CELL - 1, top + CELL - 1), "#F2F2F2")
        text = ellipsize(cell.picture, font, CELL)
        pen.text((left + CELL / 2, top + CELL / 2), text, PALE, font, anchor="mm")
    else:
        picture = ImageOps.contain(cell.picture, (CELL, CELL))
        x = left + (CELL - picture.width) // 2
        y = top + (CELL - picture.height) // 2
        page.paste(picture, (x, y))
        # a frame, as some images are white
        pen.rectangle((x - 1, y - 1, x + picture.width, y + picture.height), outline="#D0D0D0")
    if cell.colour:
        pen.rectangle((left, top + CELL + 2, left + CELL - 1, top + CELL + 4), cell.colour)
    pen.text((left, top + CELL + 7), ellipsize(cell.caption, font, CELL), PALE, font)


@cache
def load_font(size):
    """DejaVu Sans, which has many scripts, from matplotlib if installed, else Pillow's own."""
    spec = importlib.util.find_spec("matplotlib")
    path = spec and Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
    if path and path.is_file():
        return ImageFont.truetype(path, size)
    return ImageFont.load_default(size)


@cache
def has_glyph(font, letter):
    """Whether a font has a letter, and does not draw the box for a missing one."""
    if not letter.isprintable():  # such as half a surrogate pair, which fonts reject
        return False
    shape = font.getmask(letter)
    missing = font.getmask("\U0010ffff")
    return (shape.size, bytes(shape)) != (missing.size, bytes(missing))


def legible(text, font):
    """The text in letters that a font has: else without accents, else as a code, `\\u732b`."""

    def drawn(letter):
        if has_glyph(font, letter) and not unicodedata.combining(letter):
            return letter
        parts = unicodedata.normalize("NFKD", letter)
        plain = "".join(part for part in parts if not unicodedata.combining(part))
        return plain if all(has_glyph(font, part) for part in plain) else ascii(letter)[1:-1]

    return "".join(map(drawn, unicodedata.normalize("NFC", text)))


def ellipsize(text, font, width):
    """The legible text, shortened in the middle to a width: file names differ at both ends."""
    text = legible(text, font)
    ellipsis = "…" if has_glyph(font, "…") else "..."
    length = len(text)
    shown = text
    while length > 2 and font.getlength(shown) > width:
        length -= 1
        shown = f"{text[: length // 2]}{ellipsis}{text[len(text) - (length - length // 2) :]}"
    return shown
