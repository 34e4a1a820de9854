"""Short clips of the demo's world: one shape that moves among still ones, or two that appear in turn."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prismprune.demo.scenes import Thing, arrange, draw_background, finish, paint

if TYPE_CHECKING:
    from PIL import Image

FRAMES = 8
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


@dataclass(frozen=True, slots=True)
class ClipScene:
    """`things` are as in their first frame, the earlier one first; `mover`, if any, moves in `direction`.

    `casts` has what each frame shows.
    """

    frames: tuple[Image.Image, ...]
    casts: tuple[tuple[Thing, ...], ...]
    things: tuple[Thing, ...]
    mover: Thing | None
    direction: str | None


def draw_clip(rng: random.Random) -> ClipScene:
    """Draw a clip of 8 frames in order, either of motion or of appearance."""
    side = rng.randint(224, 360)
    background, tone = draw_background(rng, side, round(side / rng.uniform(1.0, 1.4)))
    if rng.random() < 0.6:
        mover, others, direction = _cast_of_motion(rng, tone)
        steps = [_moved(mover, direction, step) for step in _path(rng)]
        casts = [(step, *others) for step in steps]
        things: tuple[Thing, ...] = (steps[0], *others)
        chosen: Thing | None = steps[0]
        way: str | None = direction
    else:
        things = _differently_shaped(rng, 2, tone)
        starts = rng.randint(0, 2), rng.randint(4, 6)
        casts = [
            tuple(t for t, start in zip(things, starts, strict=True) if i >= start) for i in range(FRAMES)
        ]
        chosen = way = None
    brush = rng.getrandbits(32)  # the same strokes in every frame
    frames = tuple(finish(rng, paint(random.Random(brush), background, cast)) for cast in casts)
    return ClipScene(frames, tuple(casts), things, chosen, way)


def _differently_shaped(
    rng: random.Random, count: int, tone: tuple[float, float, float]
) -> tuple[Thing, ...]:
    while True:
        things = arrange(rng, count, tone)
        if len({thing.shape for thing in things}) == len({thing.color for thing in things}) == count:
            return things


def _cast_of_motion(
    rng: random.Random, tone: tuple[float, float, float]
) -> tuple[Thing, tuple[Thing, ...], str]:
    """A mover, placed in the middle of its way, and up to two still things off that way."""
    direction = rng.choice(list(DIRECTIONS))
    along_x = DIRECTIONS[direction][0] != 0
    while True:
        first, *others = _differently_shaped(rng, rng.randint(1, 3), tone)
        mover = dataclasses.replace(first, x=0.5) if along_x else dataclasses.replace(first, y=0.5)
        across, extent = ("y", "height") if along_x else ("x", "width")
        clear = all(
            abs(getattr(other, across) - getattr(mover, across))
            > (getattr(other, extent) + getattr(mover, extent)) / 2 + 0.02
            for other in others
        )
        if clear:
            return mover, tuple(others), direction


def _path(rng: random.Random) -> list[float]:
    """Distance from the middle of the way at each frame, from -half to +half, at an even pace."""
    half = rng.uniform(0.18, 0.32)
    return [half * (2 * step / (FRAMES - 1) - 1) for step in range(FRAMES)]


def _moved(thing: Thing, direction: str, distance: float) -> Thing:
    dx, dy = DIRECTIONS[direction]
    return dataclasses.replace(thing, x=thing.x + dx * distance, y=thing.y + dy * distance)
