"""A contact sheet: rows of small pictures under headings, each with a caption, for eyes and for
print.
"""

import importlib.util
import unicodedata
from functools import cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont, ImageOps

CELL = 112
GAP = 8
MARGIN = 24
COLUMNS = 10
INK = "#222222"
PALE = "#777777"
FRAME = "#D0D0D0"
GROUND = "#FFFFFF"


class Cell(NamedTuple):
    """A picture with its caption, and the colour of a line below it that ties it to others; a
    text in place of a picture.
    """

    picture: Image.Image | str
    caption: str = ""
    colour: str = ""


def draw_sheet(title, sections):
    """The PIL image of a sheet: `sections` are (heading, cells), of which those without cells
    are passed over.
    """
    large, middle, small = map(load_font, (22, 15, 11))
    sections = [(heading, cells) for heading, cells in sections if cells]
    step = CELL + GAP
    heights = [44 + -(-len(cells) // COLUMNS) * (step + row_below(cells)) for _, cells in sections]
    page = Image.new(
        "RGB", (2 * MARGIN + COLUMNS * step - GAP, 2 * MARGIN + 30 + sum(heights)), GROUND
    )
    pen = ImageDraw.Draw(page)
    pen.text((MARGIN, MARGIN), ellipsize(title, large, page.width - 2 * MARGIN), INK, large)
    top = MARGIN + 30
    for (heading, cells), height in zip(sections, heights, strict=True):
        pen.text(
            (MARGIN, top + 16), ellipsize(heading, middle, page.width - 2 * MARGIN), INK, middle
        )
        for number, cell in enumerate(cells):
            row, column = divmod(number, COLUMNS)
            left = MARGIN + column * step
            upper = top + 44 + row * (step + row_below(cells))
            if isinstance(cell.picture, str):
                pen.rectangle((left, upper, left + CELL - 1, upper + CELL - 1), "#F2F2F2")
                pen.text(
                    (left + CELL / 2, upper + CELL / 2),
                    ellipsize(cell.picture, small, CELL),
                    PALE,
                    small,
                    anchor="mm",
                )
            else:
                shown = ImageOps.contain(cell.picture, (CELL, CELL))
                x = left + (CELL - shown.width) // 2
                y = upper + (CELL - shown.height) // 2
                page.paste(shown, (x, y))
                # some are white
                pen.rectangle((x - 1, y - 1, x + shown.width, y + shown.height), outline=FRAME)
            if cell.colour:
                pen.rectangle(
                    (left, upper + CELL + 2, left + CELL - 1, upper + CELL + 4), cell.colour
                )
            pen.text((left, upper + CELL + 7), ellipsize(cell.caption, small, CELL), PALE, small)
        top += height
    return page


def row_below(cells):
    """The height of the captions."""
    return 16 if any(cell.caption for cell in cells) else 0


@cache
def load_font(size):
    """DejaVu Sans, which knows many scripts, where matplotlib is installed; else Pillow's own,
    which knows the Latin one.
    """
    found = importlib.util.find_spec("matplotlib")
    path = found and Path(found.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
    return (
        ImageFont.truetype(path, size) if path and path.is_file() else ImageFont.load_default(size)
    )


@cache
def has_glyph(font, letter):
    """Whether a font draws a letter, and not the box that stands for one it lacks."""
    # half a surrogate pair, which no font can be asked for, among them
    if not letter.isprintable():
        return False
    shape = font.getmask(letter)
    lacking = font.getmask("\U0010ffff")
    return (shape.size, bytes(shape)) != (lacking.size, bytes(lacking))


def legible(text, font):
    """The text in letters that a font has: accents go where need be, and a letter that it lacks
    becomes its code, `\\u732b`.
    """

    def drawn(letter):
        if has_glyph(font, letter) and not unicodedata.combining(letter):
            return letter
        plain = "".join(
            part
            for part in unicodedata.normalize("NFKD", letter)
            if not unicodedata.combining(part)
        )
        return plain if all(has_glyph(font, part) for part in plain) else ascii(letter)[1:-1]

    return "".join(map(drawn, unicodedata.normalize("NFC", text)))


def ellipsize(text, font, width):
    """The text, its middle left out where it is wider than that: names differ at both ends."""
    text = legible(text, font)
    kept = len(text)
    gap = "…" if has_glyph(font, "…") else "..."
    shown = text
    while kept > 2 and font.getlength(shown) > width:
        kept -= 1
        shown = f"{text[: kept // 2]}{gap}{text[len(text) - (kept - kept // 2) :]}"
    return shown
