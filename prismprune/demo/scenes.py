"""The demo model's world: still scenes of one to six objects, drawn on the fly, and what is true of them.

Everything varies that can: size and aspect ratio of the picture, background (plain, gradient, blobs,
stripes), noise, blur, exact color, proportions and tilt. Coordinates are fractions of the picture, so that
they survive the resize to the model's square input.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

if TYPE_CHECKING:
    import random

    from numpy.typing import NDArray

SHAPES = ("circle", "rectangle", "triangle", "star", "cross", "ring", "heart", "diamond")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 35),
    "green": (35, 160, 50),
    "blue": (35, 70, 225),
    "yellow": (245, 220, 35),
    "orange": (250, 140, 20),
    "purple": (130, 45, 170),
    "pink": (250, 135, 185),
    "brown": (125, 75, 35),
    "teal": (20, 150, 150),
    "gray": (128, 128, 128),
    "black": (15, 15, 15),
    "white": (248, 248, 248),
}
CHARACTERS = (
    "0123456789ABCDEFGHJKLMNPRSTUVWXYZ"  # without I, O and Q, which a plain font does not tell from 1 and 0
)
SIZES = ("small", "large")
_SUPERSAMPLING = 2
_CONTRAST = 110.0  # least RGB distance between an object and what lies behind it


@dataclass(frozen=True, slots=True)
class Thing:
    """One object. `x`, `y` is its centre and `width`, `height` its extent, as fractions of the picture."""

    shape: str
    color: str
    size: str
    x: float
    y: float
    width: float
    height: float
    written: str | None = None

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(frozen=True, slots=True)
class Scene:
    image: Image.Image
    things: tuple[Thing, ...]


def draw_scene(rng: random.Random, count: int | None = None) -> Scene:
    """Draw a scene of `count` objects (one to six when None), no two of the same color and shape."""
    width, height = picture_size(rng)
    background, tone = draw_background(rng, width, height)
    things = arrange(rng, count or rng.randint(1, 6), tone)
    image = paint(rng, background, things)
    return Scene(finish(rng, image), things)


def draw_written_scene(rng: random.Random) -> Scene:
    """Draw two to four objects, of which at least two, and every one that can, carry a character."""
    background, tone = draw_background(rng, *picture_size(rng))
    while True:
        things = tuple(
            replace(thing, written=rng.choice(CHARACTERS)) if can_carry_a_character(thing) else thing
            for thing in arrange(rng, rng.randint(2, 4), tone)
        )
        if sum(thing.written is not None for thing in things) > 1:
            return Scene(finish(rng, paint(rng, background, things)), things)


def picture_size(rng: random.Random) -> tuple[int, int]:
    """Width and height in pixels: aspect ratios from 3:4 to 4:3, longer side 224 to 640."""
    longer = rng.randint(224, 640)
    ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3))) if rng.random() < 0.6 else 1.0
    return (longer, round(longer / ratio)) if ratio >= 1 else (round(longer * ratio), longer)


def arrange(rng: random.Random, count: int, tone: tuple[float, float, float]) -> tuple[Thing, ...]:
    """Place `count` objects without overlap, each in a color that stands out from the background `tone`."""
    colors = [name for name, rgb in COLORS.items() if math.dist(rgb, tone) > _CONTRAST]
    while True:
        things: list[Thing] = []
        for _ in range(60 * count):
            thing = _random_thing(rng, colors, crowded=count > 4)
            taken = any(other.name == thing.name or _overlap(other, thing) for other in things)
            if not taken:
                things.append(thing)
            if len(things) == count:
                return tuple(things)


def _random_thing(rng: random.Random, colors: list[str], *, crowded: bool) -> Thing:
    size = rng.choice(SIZES)
    largest = 0.28 if crowded else 0.34
    extent = rng.uniform(0.12, 0.165) if size == "small" else rng.uniform(0.235, largest)
    shape = rng.choice(SHAPES)
    stretch = rng.uniform(0.72, 1.38) if shape == "rectangle" else rng.uniform(0.88, 1.13)
    width, height = extent * math.sqrt(stretch), extent / math.sqrt(stretch)
    thing = Thing(
        shape=shape,
        color=rng.choice(colors),
        size=size,
        x=rng.uniform(width / 2 + 0.01, 0.99 - width / 2),
        y=rng.uniform(height / 2 + 0.01, 0.99 - height / 2),
        width=width,
        height=height,
    )
    if can_carry_a_character(thing) and rng.random() < 0.5:
        return replace(thing, written=rng.choice(CHARACTERS))
    return thing


def can_carry_a_character(thing: Thing) -> bool:
    return thing.size == "large" and thing.shape not in ("ring", "cross", "star")


def _overlap(a: Thing, b: Thing, margin: float = 0.025) -> bool:
    return (
        abs(a.x - b.x) < (a.width + b.width) / 2 + margin
        and abs(a.y - b.y) < (a.height + b.height) / 2 + margin
    )


def draw_background(
    rng: random.Random, width: int, height: int
) -> tuple[Image.Image, tuple[float, float, float]]:
    """A background and its mean color; its own contrast stays well under an object's."""
    tone = np.array([rng.uniform(0, 255) for _ in range(3)])
    grey = tone.mean()
    tone = grey + (tone - grey) * rng.uniform(0.0, 0.75)
    canvas = np.broadcast_to(tone, (height, width, 3)).copy()
    kind = rng.choice(("plain", "gradient", "blobs", "stripes"))
    if kind != "plain":
        swing = np.array([rng.uniform(-30, 30) for _ in range(3)])
        canvas += swing * _pattern(rng, kind, width, height)[..., None]
    noise = np.random.default_rng(rng.getrandbits(32))
    canvas += noise.normal(0, rng.uniform(0, 9), canvas.shape[:2])[..., None]
    return Image.fromarray(canvas.clip(0, 255).astype(np.uint8)), (
        float(tone[0]),
        float(tone[1]),
        float(tone[2]),
    )


def _pattern(rng: random.Random, kind: str, width: int, height: int) -> NDArray[np.float64]:
    """A field in [-1, 1] of shape [height, width]."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    angle = rng.uniform(0, 2 * math.pi)
    along = x * math.cos(angle) + y * math.sin(angle)
    if kind == "gradient":
        return np.asarray(2 * (along - along.min()) / np.ptp(along) - 1)
    if kind == "stripes":
        return np.asarray(np.sin(2 * math.pi * along * rng.uniform(2, 12)))
    field = np.zeros_like(x)
    for _ in range(5):
        spread = rng.uniform(0.1, 0.35)
        field += rng.choice((-1, 1)) * np.exp(
            -((x - rng.random()) ** 2 + (y - rng.random()) ** 2) / (2 * spread**2)
        )
    bounded: NDArray[np.float64] = np.clip(field, -1, 1)
    return bounded


def paint(rng: random.Random, background: Image.Image, things: tuple[Thing, ...]) -> Image.Image:
    """Paint `things` over a copy of `background`, anti-aliased."""
    image = background.resize((background.width * _SUPERSAMPLING, background.height * _SUPERSAMPLING))
    draw = ImageDraw.Draw(image)
    for thing in things:
        paint_thing(rng, draw, image.size, thing)
    return image.resize(background.size, Image.Resampling.BOX)


def paint_thing(
    rng: random.Random,
    draw: ImageDraw.ImageDraw,
    size: tuple[int, int],
    thing: Thing,
    tilt: float | None = None,
) -> None:
    """Paint one object: its outline as a polygon, then what is written on it."""
    red, green, blue = (round(channel + rng.uniform(-14, 14)) for channel in COLORS[thing.color])
    fill = (min(max(red, 0), 255), min(max(green, 0), 255), min(max(blue, 0), 255))
    tilt = rng.uniform(-0.14, 0.14) if tilt is None else tilt
    for outline, hole in _outlines(thing.shape):
        points = [_place(point, thing, size, tilt) for point in outline]
        if hole is None:
            draw.polygon(points, fill=fill)
        else:  # a ring: one thick closed line
            thickness = round(hole * min(thing.width * size[0], thing.height * size[1]))
            draw.line([*points, points[0], points[1]], fill=fill, width=thickness, joint="curve")
    if thing.written:
        _write(rng, draw, size, thing, fill)


def _place(
    point: tuple[float, float], thing: Thing, size: tuple[int, int], tilt: float
) -> tuple[float, float]:
    """From the unit square centred on 0 to pixels."""
    x = point[0] * math.cos(tilt) - point[1] * math.sin(tilt)
    y = point[0] * math.sin(tilt) + point[1] * math.cos(tilt)
    return (thing.x + x * thing.width) * size[0], (thing.y + y * thing.height) * size[1]


def _round(radius: float) -> list[tuple[float, float]]:
    return [
        (radius * math.cos(2 * math.pi * i / 48), radius * math.sin(2 * math.pi * i / 48)) for i in range(48)
    ]


def _outlines(shape: str) -> list[tuple[list[tuple[float, float]], float | None]]:
    """Polygons in the unit square centred on 0; a number beside one is the thickness of a line."""
    if shape == "circle":
        return [(_round(0.5), None)]
    if shape == "ring":
        return [(_round(0.4), 0.2)]
    if shape == "star":
        turns = [(-math.pi / 2 + math.pi * i / 5, 0.55 if i % 2 == 0 else 0.23) for i in range(10)]
        return [([(r * math.cos(a), r * math.sin(a)) for a, r in turns], None)]
    if shape == "heart":
        turn = [2 * math.pi * i / 48 for i in range(48)]
        curve = [
            (
                16 * math.sin(t) ** 3,
                -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)),
            )
            for t in turn
        ]
        return [([(x / 34, y / 30) for x, y in curve], None)]
    if shape == "cross":
        a, b = 0.17, 0.5
        bars = [(-b, -a), (b, -a), (b, a), (-b, a)], [(-a, -b), (a, -b), (a, b), (-a, b)]
        return [(list(bar), None) for bar in bars]
    corners = {
        "rectangle": [(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)],
        "triangle": [(0.0, -0.5), (0.5, 0.5), (-0.5, 0.5)],
        "diamond": [(0.0, -0.56), (0.44, 0.0), (0.0, 0.56), (-0.44, 0.0)],
    }
    return [(corners[shape], None)]


def _write(
    rng: random.Random,
    draw: ImageDraw.ImageDraw,
    size: tuple[int, int],
    thing: Thing,
    fill: tuple[int, int, int],
) -> None:
    dark = sum(fill) > 3 * 128
    ink = (10, 10, 10) if dark else (250, 250, 250)
    pixels = 0.62 * min(thing.width * size[0], thing.height * size[1])
    low = 0.12 * thing.height if thing.shape == "triangle" else 0.0
    draw.text(
        (thing.x * size[0], (thing.y + low) * size[1]),
        thing.written or "",
        fill=ink,
        font=ImageFont.load_default(max(pixels, 12)),
        anchor="mm",
        stroke_width=rng.choice((0, 1, 2)),
        stroke_fill=ink,
    )


def finish(rng: random.Random, image: Image.Image) -> Image.Image:
    """What a camera adds: blur now and then, and a little grain."""
    if rng.random() < 0.25:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.2)))
    grain = np.random.default_rng(rng.getrandbits(32)).normal(
        0, rng.uniform(0, 6), (image.height, image.width, 3)
    )
    return Image.fromarray((np.asarray(image, dtype=np.float32) + grain).clip(0, 255).astype(np.uint8))
