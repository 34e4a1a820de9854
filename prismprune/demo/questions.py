"""Questions about scenes and clips, with their true answers.

Every kind of question has phrasings for training and others, never trained on, for evaluation (`HELD_OUT`).
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from prismprune.demo.clips import DIRECTIONS, ClipScene
from prismprune.demo.scenes import COLORS, SHAPES, Scene, Thing
from prismprune.evaluation.subjects import Question

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterable

__all__ = ["HELD_OUT", "TRAINED", "Question", "clip_questions", "scene_questions"]

SIDE_MARGIN = 0.07  # a thing nearer to the middle line than this is on no side
APART = 0.1  # two things nearer than this along an axis have no order along it


TRAINED: dict[str, tuple[str, ...]] = {
    "color": (
        "What color is {it}?",
        "What is the color of {it}?",
        "Tell me the color of {it}.",
        "Which color does {it} have?",
        "{it}: what color?",
        "what colour is {it}?",
    ),
    "shape": (
        "What shape is {it}?",
        "What is {it}?",
        "Which shape does {it} have?",
        "Tell me the shape of {it}.",
        "what is the shape of {it}?",
    ),
    "size": (
        "Is {it} small or large?",
        "How big is {it}, small or large?",
        "What size is {it}?",
        "Is {it} large or small?",
        "Tell me the size of {it}.",
    ),
    "side": (
        "Is {it} on the {a} or on the {b}?",
        "Is {it} at the {a} or at the {b} of the picture?",
        "On which side is {it}, {a} or {b}?",
        "{it}: {a} or {b}?",
        "Do you see {it} at the {a} or at the {b}?",
    ),
    "corner": (
        "Where is {it}?",
        "In which corner is {it}?",
        "Which part of the picture is {it} in?",
        "Where do you see {it}?",
        "what is the position of {it}?",
    ),
    "count": (
        "How many {them} are there?",
        "How many {them} do you see?",
        "Count the {them}.",
        "What is the number of {them}?",
        "how many {them} are in the picture?",
    ),
    "existence": (
        "Is there {one}?",
        "Is there {one} in the picture?",
        "Do you see {one}?",
        "Does the picture show {one}?",
        "Is {one} present?",
    ),
    "relation": (
        "Is {it} {relation} {other}?",
        "Do you see {it} {relation} {other}?",
        "Is it true that {it} is {relation} {other}?",
        "{it} is {relation} {other}, yes or no?",
        "would you say {it} is {relation} {other}?",
    ),
    "further": (
        "Which is further {way}, {it} or {other}?",
        "What is further {way}: {it} or {other}?",
        "Of {it} and {other}, which is further {way}?",
        "{it} or {other}, which one is further {way}?",
    ),
    "written": (
        "What is written on {it}?",
        "Which character is on {it}?",
        "What does {it} say?",
        "Read what is on {it}.",
        "Which letter or digit is written on {it}?",
    ),
    "moves": (
        "What moves?",
        "Which shape moves?",
        "What is moving?",
        "Which shape is in motion?",
        "what thing moves in the video?",
    ),
    "moving_color": (
        "What color is the shape that moves?",
        "Which color does the moving shape have?",
        "What is the color of the thing that moves?",
        "what color moves?",
    ),
    "direction": (
        "Which way does {it} move?",
        "In which direction does {it} move?",
        "Where does {it} go?",
        "Which way is {it} going?",
        "what is the direction of {it}?",
    ),
    "first": (
        "What came first, {it} or {other}?",
        "Which came first: {it} or {other}?",
        "What appeared first, {it} or {other}?",
        "Which one is seen first, {it} or {other}?",
        "{it} or {other}, what came first?",
    ),
}
HELD_OUT: dict[str, tuple[str, ...]] = {
    "color": ("Can you name the color of {it}?", "Please say what color {it} is."),
    "shape": ("Can you name the shape of {it}?", "Please say what shape {it} is."),
    "size": ("Would you call {it} small or large?", "Please say the size of {it}."),
    "side": ("Would you find {it} on the {a} or the {b} side?", "Please say where {it} is, {a} or {b}."),
    "corner": ("Please say where {it} is.", "Can you tell me in what part of the image {it} is?"),
    "count": ("Can you count the {them}?", "Please say how many {them} the picture has."),
    "existence": ("Can you see {one}?", "Please say if the image contains {one}."),
    "relation": (
        "Can you confirm that {it} is {relation} {other}?",
        "Please say if {it} is {relation} {other}.",
    ),
    "further": (
        "Please say which is further {way}, {it} or {other}.",
        "Which one lies further {way}: {it} or {other}?",
    ),
    "written": ("Can you read what {it} says?", "Please say what is written on {it}."),
    "moves": ("Can you name the shape that moves?", "Please say what is moving."),
    "moving_color": ("Please say the color of the moving shape.", "Can you name the color of what moves?"),
    "direction": ("Can you tell which way {it} moves?", "Please say in what direction {it} is moving."),
    "first": (
        "Can you tell which came first, {it} or {other}?",
        "Please say what came first, {it} or {other}.",
    ),
}
DESCRIBE_ONE = ("Describe {it}.", "What do you see of {it}?", "What can you tell about {it}?")
DESCRIBE_ALL = (
    "List the shapes from {a} to {b}.",
    "What is there from {a} to {b}?",
    "Name everything from {a} to {b}.",
)
DESCRIBE_PAIR = ("Where is {it} from {other}?", "How does {it} lie to {other}?", "{it}: where from {other}?")
LESSON_WEIGHTS = {"relation": 2, "further": 2, "count": 2, "written": 2, "shape": 0.5, "side": 0.5}
"""Training asks more of what is hard to learn, less of what is learned early; 1 for a kind not named."""
DESCRIBE_CLIP = ("What happens?", "Describe the video.", "Tell me what happens in the clip.")


def scene_descriptions(rng: random.Random, scene: Scene, number: int) -> list[Question]:
    """Descriptions for training: the objects in order along an axis, and up to `number` objects and pairs.

    Many true words an answer: by far the densest lesson in what is where. None of them is evaluated.
    """
    a, b = rng.choice(list(_ORDERS))
    axis, sign = _ORDERS[a, b]
    ordered = sorted(scene.things, key=lambda thing: sign * getattr(thing, axis))
    everything = ", ".join(thing.name for thing in ordered)
    asked = [Question("describe", rng.choice(DESCRIBE_ALL).format(a=a, b=b), everything)]
    for thing in rng.sample(scene.things, min(number, len(scene.things))):
        text = rng.choice(DESCRIBE_ONE).format(it=_refer(rng, scene, thing))
        asked.append(Question("describe", text, _description(thing)))
    for one, other in _pairs(rng, scene, number):
        text = rng.choice(DESCRIBE_PAIR).format(it=_refer(rng, scene, one), other=_refer(rng, scene, other))
        if way := way_between(one, other):
            asked.append(Question("describe", text[0].upper() + text[1:], way))
    return asked


def _pairs(rng: random.Random, scene: Scene, number: int) -> list[tuple[Thing, Thing]]:
    pairs = list(itertools.permutations(scene.things, 2))
    return rng.sample(pairs, min(number, len(pairs)))


def way_between(one: Thing, other: Thing) -> str:
    """Where `one` lies as seen from `other`, on each axis on which they are apart."""
    across, down = one.x - other.x, one.y - other.y
    words = [("right" if across > 0 else "left") if abs(across) > APART else ""]
    words += [("below" if down > 0 else "above") if abs(down) > APART else ""]
    return " and ".join(filter(None, words))


def clip_description(rng: random.Random, clip: ClipScene) -> Question:
    """What happens in a clip, for training."""
    if clip.mover:
        answer = f"the {clip.mover.name} moves {clip.direction}"
    else:
        early, late = clip.things[:2]
        answer = f"first the {early.name}, then the {late.name}"
    return Question("describe", rng.choice(DESCRIBE_CLIP), answer)


def _description(thing: Thing) -> str:
    words = [thing.size, thing.name]
    if (corner := _corner_of(thing)) is not None:
        words.append(corner)
    if thing.written:
        words.append(f"with {thing.written}")
    return " ".join(words)


def scene_questions(
    rng: random.Random,
    scene: Scene,
    number: int,
    phrasings: dict[str, tuple[str, ...]],
    weights: dict[str, float] | None = None,
) -> list[Question]:
    """Up to `number` different questions about `scene`.

    Kinds are drawn evenly as far as the scene allows them, or by `weights` (1 for a kind that is not named).
    """
    return _ask(rng, scene, _SCENE_KINDS, number, phrasings, weights or {})


def clip_questions(
    rng: random.Random, clip: ClipScene, number: int, phrasings: dict[str, tuple[str, ...]]
) -> list[Question]:
    """Up to `number` different questions about `clip`."""
    return _ask(rng, clip, _MOTION_KINDS if clip.mover else _ORDER_KINDS, number, phrasings, {})


def _ask(  # noqa: PLR0917 (private, called from two places)
    rng: random.Random,
    subject: Scene | ClipScene,
    kinds: dict[str, Callable[..., tuple[dict[str, str], str] | None]],
    number: int,
    phrasings: dict[str, tuple[str, ...]],
    weights: dict[str, float],
) -> list[Question]:
    asked: dict[tuple[str, str], Question] = {}
    shares = list(itertools.accumulate(weights.get(kind, 1.0) for kind in kinds)) if weights else None
    for _ in range(6 * number):
        # Two ways to draw, for an even draw must not change: what is evaluated hangs on it.
        kind = rng.choices(list(kinds), cum_weights=shares)[0] if shares else rng.choice(list(kinds))
        filled = kinds[kind](rng, subject)
        if filled is None:
            continue
        slots, answer = filled
        # Two phrasings of one question are one question.
        key = (kind, str(sorted(slots.items())))
        text = rng.choice(phrasings[kind]).format(**slots)
        asked.setdefault(
            key, Question(kind, text[0].upper() + text[1:] if rng.random() < 0.7 else text, answer)
        )
        if len(asked) == number:
            break
    return list(asked.values())


def _unique(things: Iterable[Thing], attribute: str) -> list[Thing]:
    values = [getattr(thing, attribute) for thing in things]
    return [thing for thing in things if values.count(getattr(thing, attribute)) == 1]


def _refer(rng: random.Random, scene: Scene | ClipScene, thing: Thing) -> str:
    """A phrase that means this thing and no other: by shape or color where unique, else by both."""
    phrases = [f"the {thing.name}"]
    if thing in _unique(scene.things, "shape"):
        phrases.append(f"the {thing.shape}")
    if thing in _unique(scene.things, "color"):
        phrases.append(f"the {thing.color} shape")
    return rng.choice(phrases)


def _article(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


_Filled = tuple[dict[str, str], str] | None


def _color(rng: random.Random, scene: Scene) -> _Filled:
    things = _unique(scene.things, "shape")
    if not things:
        return None
    thing = rng.choice(things)
    word = "shape" if len(scene.things) == 1 and rng.random() < 0.3 else thing.shape
    return {"it": f"the {word}"}, thing.color


def _shape(rng: random.Random, scene: Scene) -> _Filled:
    things = _unique(scene.things, "color")
    if not things:
        return None
    thing = rng.choice(things)
    word = "shape" if len(scene.things) == 1 and rng.random() < 0.3 else f"{thing.color} shape"
    return {"it": f"the {word}"}, thing.shape


def _size(rng: random.Random, scene: Scene) -> _Filled:
    thing = rng.choice(scene.things)
    return {"it": _refer(rng, scene, thing)}, thing.size


def _side(rng: random.Random, scene: Scene) -> _Filled:
    thing = rng.choice(scene.things)
    sides, place = rng.choice(((("left", "right"), thing.x), (("top", "bottom"), thing.y)))
    if abs(place - 0.5) < SIDE_MARGIN:
        return None
    a, b = rng.sample(sides, 2)
    return {"it": _refer(rng, scene, thing), "a": a, "b": b}, sides[place > 0.5]


def _corner(rng: random.Random, scene: Scene) -> _Filled:
    thing = rng.choice(scene.things)
    corner = _corner_of(thing)
    return None if corner is None else ({"it": _refer(rng, scene, thing)}, corner)


def _corner_of(thing: Thing) -> str | None:
    """None for a thing too near to a middle line."""
    if min(abs(thing.x - 0.5), abs(thing.y - 0.5)) < SIDE_MARGIN:
        return None
    return f"{'top' if thing.y < 0.5 else 'bottom'} {'left' if thing.x < 0.5 else 'right'}"


def _count(rng: random.Random, scene: Scene) -> _Filled:
    what = rng.choice(("all", "all", "color", "shape"))
    if what == "all":
        return {"them": rng.choice(("shapes", "objects"))}, str(len(scene.things))
    value = getattr(rng.choice(scene.things), what)
    if rng.random() < 0.25:
        value = rng.choice(list(COLORS) if what == "color" else SHAPES)
    number = sum(getattr(thing, what) == value for thing in scene.things)
    plural = f"{value} shapes" if what == "color" else f"{value}es" if value == "cross" else f"{value}s"
    return {"them": plural}, str(number)


def _existence(rng: random.Random, scene: Scene) -> _Filled:
    here = rng.random() < 0.5
    what = rng.choice(("name", "name", "color", "shape"))
    present = {getattr(thing, what) for thing in scene.things}
    value = rng.choice(sorted(present)) if here else _absent(rng, scene, what, present)
    return {"one": _article(f"{value} shape" if what == "color" else value)}, "yes" if here else "no"


def _absent(rng: random.Random, scene: Scene, what: str, present: set[str]) -> str:
    """Something that is not there; for a name, mostly one of a color or a shape that is."""
    while True:
        color, shape = rng.choice(list(COLORS)), rng.choice(SHAPES)
        near = rng.choice(scene.things)
        if what == "name" and rng.random() < 0.7:
            color, shape = rng.choice(((near.color, shape), (color, near.shape)))
        value = {"name": f"{color} {shape}", "color": color, "shape": shape}[what]
        if value not in present:
            return value


_RELATIONS = {
    "left of": ("x", -1),
    "to the left of": ("x", -1),
    "right of": ("x", 1),
    "to the right of": ("x", 1),
    "above": ("y", -1),
    "below": ("y", 1),
}
_ORDERS = {
    ("left", "right"): ("x", 1),
    ("right", "left"): ("x", -1),
    ("top", "bottom"): ("y", 1),
    ("bottom", "top"): ("y", -1),
}
_WAYS = {"left": ("x", -1), "right": ("x", 1), "up": ("y", -1), "down": ("y", 1)}


def _pair(rng: random.Random, scene: Scene, axis: str) -> tuple[Thing, Thing, float] | None:
    if len(scene.things) < 2:
        return None
    one, other = rng.sample(scene.things, 2)
    apart = getattr(one, axis) - getattr(other, axis)
    return (one, other, apart) if abs(apart) > APART else None


def _relation(rng: random.Random, scene: Scene) -> _Filled:
    relation = rng.choice(list(_RELATIONS))
    axis, sign = _RELATIONS[relation]
    pair = _pair(rng, scene, axis)
    if pair is None:
        return None
    one, other, apart = pair
    slots = {"it": _refer(rng, scene, one), "other": _refer(rng, scene, other), "relation": relation}
    return slots, "yes" if apart * sign > 0 else "no"


def _further(rng: random.Random, scene: Scene) -> _Filled:
    way = rng.choice(list(_WAYS))
    axis, sign = _WAYS[way]
    pair = _pair(rng, scene, axis)
    if pair is None or pair[0].shape == pair[1].shape:
        return None
    one, other, apart = pair
    winner = one if apart * sign > 0 else other
    return {"it": f"the {one.name}", "other": f"the {other.name}", "way": way}, winner.shape


def _written(rng: random.Random, scene: Scene) -> _Filled:
    things = [thing for thing in scene.things if thing.written]
    if not things:
        return None
    thing = rng.choice(things)
    return {"it": _refer(rng, scene, thing)}, thing.written or ""


def _moves(_rng: random.Random, clip: ClipScene) -> _Filled:
    return ({}, clip.mover.shape) if clip.mover else None


def _moving_color(_rng: random.Random, clip: ClipScene) -> _Filled:
    return ({}, clip.mover.color) if clip.mover else None


def _direction(rng: random.Random, clip: ClipScene) -> _Filled:
    if clip.mover is None or clip.direction not in DIRECTIONS:
        return None
    by_motion = rng.random() < 0.3
    return {"it": "the moving shape" if by_motion else _refer(rng, clip, clip.mover)}, clip.direction


def _first(rng: random.Random, clip: ClipScene) -> _Filled:
    early, late = clip.things[:2]
    one, other = rng.sample((early, late), 2)
    return {"it": _refer(rng, clip, one), "other": _refer(rng, clip, other)}, early.shape


_SCENE_KINDS: dict[str, Callable[..., _Filled]] = {
    "color": _color,
    "shape": _shape,
    "size": _size,
    "side": _side,
    "corner": _corner,
    "count": _count,
    "existence": _existence,
    "relation": _relation,
    "further": _further,
    "written": _written,
}
_MOTION_KINDS: dict[str, Callable[..., _Filled]] = {
    "moves": _moves,
    "moving_color": _moving_color,
    "direction": _direction,
}
_ORDER_KINDS: dict[str, Callable[..., _Filled]] = {"first": _first, "color": _color, "shape": _shape}
