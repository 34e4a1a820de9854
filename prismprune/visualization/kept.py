"""Draws kept visual tokens over the picture they were chosen from."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw

from prismprune.errors import InvalidOptionError
from prismprune.media import Clip, Picture

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from prismprune.results import PartMap

Color = tuple[int, int, int]
Box = tuple[int, int, int, int]

# Rare in pictures, and apart in lightness as well as hue: color-blind readers can tell them, too.
SALIENT: Color = (255, 0, 200)
DIVERSE: Color = (0, 235, 255)
KEPT: Color = (255, 230, 0)
"""Where the method does not tell salient from diverse."""
LINE = 2
"""Pixels around a kept patch, whose own colors stay as they are."""
DIMMED = 0.3
"""Brightness of what was dropped, in gray."""
SHORTEST_LONG_SIDE = 672
"""Smaller pictures are enlarged to this, so that the outline of a patch leaves something of it."""
GAP = 8
"""Pixels between the tiles of a sheet."""


def draw_kept(
    image: Image.Image, token_map: Iterable[PartMap], *, size: tuple[int, int] | None = None
) -> Image.Image:
    """The picture with salient patches in magenta, diverse ones in cyan and dropped ones dimmed.

    token_map: the parts (image, crops) of this one picture or frame. `size`: width and height of the
    original that their boxes refer to, where `image` is a smaller copy.
    """
    canvas = _enlarged(image.convert("RGB"))
    drawn = canvas.convert("L").point([round(DIMMED * level) for level in range(256)]).convert("RGB")
    pen = ImageDraw.Draw(drawn)
    width, height = size or image.size
    scale = (canvas.width / width, canvas.height / height)
    for part in token_map:
        for index, color in _colored(part):
            box = _cell(part, index, scale)
            drawn.paste(canvas.crop(box), box)
            pen.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline=color, width=LINE)
    return drawn


def draw_sheet(media: Sequence[Picture | Clip], token_map: Sequence[PartMap]) -> Image.Image:
    """All pictures and frames of a request on one sheet, in order, at most four in a row.

    Raises InvalidOptionError without media.
    """
    tiles = [
        draw_kept(image, _parts(token_map, place, frame), size=medium.size)
        for place, medium in enumerate(media)
        for frame, image in _images(medium)
    ]
    if not tiles:
        raise InvalidOptionError("There is nothing to draw.")
    columns = min(len(tiles), 4)
    across, down = (max(tile.size[axis] for tile in tiles) + GAP for axis in (0, 1))
    sheet = Image.new("RGB", (columns * across - GAP, math.ceil(len(tiles) / columns) * down - GAP), "white")
    for number, tile in enumerate(tiles):
        sheet.paste(tile, (number % columns * across, number // columns * down))
    return sheet


def _parts(token_map: Iterable[PartMap], media: int, frame: int | None) -> Iterator[PartMap]:
    return (part for part in token_map if part.media == media and part.frame == frame)


def _images(medium: Picture | Clip) -> list[tuple[int | None, Image.Image]]:
    return list(enumerate(medium.frames)) if isinstance(medium, Clip) else [(None, medium.image)]


def _enlarged(image: Image.Image) -> Image.Image:
    scale = SHORTEST_LONG_SIDE / max(image.size)
    if scale <= 1:
        return image
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))


def _colored(part: PartMap) -> Iterator[tuple[int, Color]]:
    if part.salient is None or part.diverse is None:
        yield from ((index, KEPT) for index in part.kept)
        return
    yield from ((index, SALIENT) for index in part.salient)
    yield from ((index, DIVERSE) for index in part.diverse)


def _cell(part: PartMap, index: int, scale: tuple[float, float]) -> Box:
    """The patch `index` (raster order) in pixels of the canvas; at least one pixel."""
    rows, columns = part.grid
    row, column = divmod(index, columns)
    left, top, right, bottom = part.box
    across, down = (right - left) / columns, (bottom - top) / rows
    x = (round((left + (column + i) * across) * scale[0]) for i in (0, 1))
    y = (round((top + (row + i) * down) * scale[1]) for i in (0, 1))
    (x0, x1), (y0, y1) = x, y
    return x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)
