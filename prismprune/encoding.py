"""Media to the visual tokens that stay: tower, scores, budget, selection, and only then the projector.

No question takes part, so one encoding serves every question about its media.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from prismprune.budget import TokenBudget
from prismprune.errors import InvalidOptionError
from prismprune.families.base import KeptPart
from prismprune.meters import Stopwatch
from prismprune.results import PartMap, Timings, VisualTokens
from prismprune.selection import Scores, Selection, Selector, selector

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from prismprune.families.base import Family, Grid, Pixels, Reading, Region, View, Visual
    from prismprune.media import Clip, Picture

NOT_PRUNED = "none"
"""The method that is reported where every token stayed."""


@dataclass(frozen=True, slots=True)
class EncodingRequest:
    """Media of one request and how many of their visual tokens stay.

    Raises whatever `selector` raises for the method and its options.
    """

    media: tuple[Picture | Clip, ...]
    budget: TokenBudget = field(default_factory=TokenBudget.all)
    method: str = "prism"
    method_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.selector()

    def selector(self) -> Selector:
        return selector(self.method, **self.method_options)


@dataclass(frozen=True, slots=True)
class EncodedMedia:
    """The visual tokens that stay, ready for the language model: what each placeholder stands for, in order.

    `timings` holds the stages from decoding to selection; those shared by a batch are the batch's.
    """

    visuals: tuple[Visual, ...]
    visual_tokens: VisualTokens
    token_map: tuple[PartMap, ...]
    timings: Timings
    warnings: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """What the visual tokens take of the device's memory."""
        return sum(visual.features.nbytes for visual in self.visuals)

    def apart(self) -> EncodedMedia:
        """The same, holding no memory but its own: of a batch's tokens it may be a view."""
        return replace(self, visuals=tuple(map(_apart, self.visuals)))


def _apart(visual: Visual) -> Visual:
    features = visual.features
    if features.untyped_storage().nbytes() == features.nbytes:
        return visual
    return replace(visual, features=features.clone())


@dataclass(slots=True)
class _Part:
    """One view on its way: its row among the pixels of its size, how many of its patches stay, and which.

    candidates: the part of the grid to choose from. prefix: its tokens that are no patches. tokens: [K, d],
    those that stay, as the projector takes them. keep and selection (raster indices of the whole grid) None:
    all, also tokens that are no patches.
    """

    view: View
    pixels: Pixels
    row: int
    candidates: Region
    prefix: int
    reading: Reading = field(init=False)
    tokens: Tensor = field(init=False)
    keep: int | None = None
    selection: Selection | None = None

    @property
    def original(self) -> int:
        """Visual tokens without pruning."""
        return self.prefix + self.candidates.area

    @property
    def raster(self) -> Tensor:
        """Raster indices of the candidates in the whole grid."""
        return self.candidates.raster(self.pixels.grid)

    def read(self, reading: Reading) -> None:
        """Take all tokens, until some are chosen."""
        self.reading, self.tokens = reading, reading.tokens[self.row]
        if self.candidates.shape != self.pixels.grid:
            seen = _moved(self.raster, self.tokens)
            self.tokens = torch.cat([self.tokens[: self.prefix], self.tokens[self.prefix :][seen]])


@torch.inference_mode()
def encode(family: Family, requests: Sequence[EncodingRequest]) -> list[EncodedMedia]:
    """Encode all requests together: views of one size share a tower run, and those of equal K a selection.

    Raises `InvalidOptionError` for a request without media.
    """
    if not all(request.media for request in requests):
        raise InvalidOptionError("A request needs at least one picture or video.")
    watch = Stopwatch(family.model.device)
    views = [family.views(request.media) for request in requests]
    pixels = family.preprocess([view for own in views for view in own])
    return encode_pixels(family, requests, views, pixels, preprocess_ms=watch.lap_ms())


def encode_pixels(
    family: Family,
    requests: Sequence[EncodingRequest],
    views: Sequence[Sequence[View]],
    pixels: Sequence[Pixels],
    *,
    preprocess_ms: float = 0.0,
) -> list[EncodedMedia]:
    """`encode` from processed pixels, which took `preprocess_ms`; `views` are those of each request.

    Where gradients are on, they reach what projects and arranges the survivors, but never the tower: a
    selection has none.
    """
    watch = Stopwatch(family.model.device)
    with torch.no_grad():
        parts = _by_request(family, views, pixels)
        _share_budgets(requests, parts)
        _read(family, requests, parts)
        vision = watch.lap()  # nothing waits for the tower before the selection is under way behind it
        _select(family, requests, parts)
        select = watch.lap()
    visuals = _arrange(family, parts)
    vision_ms = watch.lap_ms() + vision.ms  # by now all is done: another stream may be the next to read it
    shared = Timings(preprocess_ms=preprocess_ms, vision_ms=vision_ms, select_ms=select.ms)
    return [_encoded(*one, shared) for one in zip(requests, parts, visuals, strict=True)]


def _by_request(
    family: Family, views: Sequence[Sequence[View]], pixels: Sequence[Pixels]
) -> list[list[_Part]]:
    """Sort what is processed by size back into the order of the requests and their views."""
    flat = [view for own in views for view in own]
    parts = {
        place: _Part(flat[place], group, row, group.region(row), family.prefix(group.modality))
        for group in pixels
        for row, place in enumerate(group.places)
    }
    in_order = iter([parts[place] for place in range(len(flat))])
    return [[next(in_order) for _ in own] for own in views]


def _read(family: Family, requests: Sequence[EncodingRequest], parts: Sequence[Sequence[_Part]]) -> None:
    """Run the tower, of each view for the patches that its method may keep or compares."""
    groups: dict[int, dict[int, tuple[_Part, Selector]]] = defaultdict(dict)
    for request, own in zip(requests, parts, strict=True):
        choose = request.selector()
        for part in own:
            groups[id(part.pixels)][part.row] = part, choose
    for group in groups.values():
        some = any(part.keep is not None and choose.looks_at_few for part, choose in group.values())
        reading = family.read(group[0][0].pixels, partial(_wanted, group) if some else None)
        for part, _ in group.values():
            part.read(reading)


def _wanted(group: Mapping[int, tuple[_Part, Selector]], row: int, attention: Tensor) -> Tensor | None:
    """Raster indices [M] of what is looked at of a view, whose attention is [H, N]; None: of everything."""
    part, choose = group[row]
    if part.keep is None:
        return None
    seen = _moved(part.raster, attention)
    chosen = choose.looks_at(attention[None, :, seen], part.keep)
    return None if chosen is None else seen[chosen[0]]


def _share_budgets(requests: Sequence[EncodingRequest], parts: Sequence[Sequence[_Part]]) -> None:
    for request, own in zip(requests, parts, strict=True):
        original = _original(own)
        if request.budget.resolve(original) < original:
            candidates = [part.candidates.area for part in own]
            for part, keep in zip(own, request.budget.split(candidates), strict=True):
                part.keep = keep


def _original(parts: Sequence[_Part]) -> int:
    """Visual tokens without pruning."""
    return sum(part.original for part in parts)


def _select(family: Family, requests: Sequence[EncodingRequest], parts: Sequence[Sequence[_Part]]) -> None:
    """Select for views with equally many candidates and tokens to keep at once; compute each score once."""
    by_reading: dict[int, dict[tuple[Selector, int, Grid], list[_Part]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for request, own in zip(requests, parts, strict=True):
        choose = request.selector()
        for part in own:
            if part.keep is not None:
                by_reading[id(part.reading)][choose, part.keep, part.candidates.shape].append(part)
    for groups in by_reading.values():
        scores: _WholeScores | None = None
        for (choose, keep, _), group in groups.items():
            scores = scores or _WholeScores(family, group[0].reading)
            _select_group(choose, keep, group, scores)


class _WholeScores:
    """The scores of every view and patch of one reading, each computed when a method first asks for it."""

    def __init__(self, family: Family, reading: Reading) -> None:
        self._family = family
        self._reading = reading

    @cached_property
    def attention(self) -> Tensor:
        """[B, H, N]."""
        return self._reading.attention()

    @cached_property
    def keys(self) -> Tensor:
        """[B, H, N, head_dim]."""
        return self._reading.keys()

    @cached_property
    def projected(self) -> Tensor:
        """[B, N, width]."""
        return self._family.project(self._reading.patches)

    def of(self, choose: Selector, group: Sequence[_Part], seen: Tensor) -> Scores:
        """What `choose` asks for, of the group's views, and of each the raster indices `seen` [B, M]."""
        rows = [part.row for part in group]

        def pick(values: Tensor, patches: int) -> Tensor:
            every = rows == list(range(len(values)))
            own = values if every else values[_moved(torch.tensor(rows), values)]
            if own.shape[patches] == seen.shape[1]:
                return own
            shape = [{0: len(rows), patches: -1}.get(dimension, 1) for dimension in range(own.ndim)]
            return own.take_along_dim(_moved(seen, values).view(shape), patches)

        return Scores(
            attention=pick(self.attention, 2),
            features=pick(self._reading.patches, 1),
            grid=group[0].candidates.shape,
            keys=pick(self.keys, 2) if choose.needs_keys else None,
            projected=pick(self.projected, 1) if choose.needs_projected else None,
        )


def _moved(indices: Tensor, like: Tensor) -> Tensor:
    """`indices`, from the CPU to the device of `like`, without waiting for what that is at."""
    return indices.to(like.device, non_blocking=True)


def _select_group(choose: Selector, keep: int, group: Sequence[_Part], scores: _WholeScores) -> None:
    seen = torch.stack([part.raster for part in group])
    own = scores.of(choose, group, seen)
    selection = choose(own, keep)
    tokens = selection.tokens(own.features)
    salient, diverse = (
        None if chosen is None else seen.gather(1, chosen.cpu())
        for chosen in (selection.salient, selection.diverse)
    )
    on_host = Selection(seen.gather(1, selection.indices.cpu()), salient, diverse)
    for row, part in enumerate(group):
        part.tokens, part.selection = tokens[row], on_host.image(row)


def _arrange(family: Family, parts: Sequence[Sequence[_Part]]) -> list[tuple[Visual, ...]]:
    """Project the survivors of the whole batch in one call, and let the family pack those of each medium."""
    survivors = [part.tokens for own in parts for part in own]
    projected = family.project(torch.cat(survivors))
    by_view = iter(torch.split(projected, [len(tokens) for tokens in survivors]))
    kept = [[_kept_part(part, next(by_view)) for part in own] for own in parts]
    return [
        tuple(
            visual
            for _, medium in groupby(own, key=lambda part: part.view.media)
            for visual in family.arrange(list(medium))
        )
        for own in kept
    ]


def _kept_part(part: _Part, projected: Tensor) -> KeptPart:
    kept = None if part.selection is None else part.selection.indices
    return KeptPart(part.view, part.pixels.grid, part.candidates, kept, projected)


def _encoded(
    request: EncodingRequest, parts: Sequence[_Part], visuals: tuple[Visual, ...], shared: Timings
) -> EncodedMedia:
    token_map = tuple(_part_map(part) for part in parts)
    newlines = sum(visual.newlines for visual in visuals)
    visual_tokens = replace(_visual_tokens(request, parts, token_map), newlines=newlines)
    return EncodedMedia(
        visuals=visuals,
        visual_tokens=visual_tokens,
        token_map=token_map,
        timings=replace(shared, decode_ms=sum(media.decode_ms for media in request.media)),
        warnings=tuple(_warnings(request.budget, visual_tokens, token_map)),
    )


def _visual_tokens(
    request: EncodingRequest, parts: Sequence[_Part], token_map: Sequence[PartMap]
) -> VisualTokens:
    budget, kept = request.budget, sum(len(part.tokens) for part in parts)
    salient = [part.salient for part in token_map if part.salient is not None]
    diverse = [part.diverse for part in token_map if part.diverse is not None]
    return VisualTokens(
        original=_original(parts),
        kept=kept,
        salient=sum(map(len, salient)) if salient else None,
        diverse=sum(map(len, diverse)) if diverse else None,
        budget=None if budget.is_all else budget.tokens or kept,  # a ratio's is what it came to
        method=NOT_PRUNED if all(part.keep is None for part in parts) else request.method,
    )


def _warnings(
    budget: TokenBudget, visual_tokens: VisualTokens, token_map: Sequence[PartMap]
) -> Iterator[str]:
    """What may surprise of a budget: that it prunes nothing, or leaves nothing of a picture or a frame."""
    if visual_tokens.method == NOT_PRUNED:
        if not budget.is_all:
            yield _why_nothing(budget, visual_tokens.original)
        return
    left = Counter[tuple[int, int | None]]()
    for part in token_map:
        left[part.media, part.frame] += len(part.kept)
    if unseen := sum(count == 0 for count in left.values()):
        kinds = "frames and pictures" if any(part.frame is not None for part in token_map) else "pictures"
        yield f"{unseen} of {len(left)} {kinds} have none of the {visual_tokens.kept} visual tokens kept"


def _why_nothing(budget: TokenBudget, original: int) -> str:
    if budget.tokens is None:
        keeps = f"keep_ratio {budget.ratio:g} keeps all"
    else:
        keeps = f"token_budget {budget.tokens} is at or above the"
    return f"{keeps} {original} visual tokens of the media; nothing was pruned"


def _part_map(part: _Part) -> PartMap:
    selection = part.selection or Selection(part.raster)
    return PartMap(
        media=part.view.media,
        crop=part.view.crop,
        frame=part.view.frame,
        time_s=part.view.time_s,
        grid=part.pixels.grid,
        box=part.pixels.boxes[part.row],
        salient=None if selection.salient is None else tuple(selection.salient.tolist()),
        diverse=None if selection.diverse is None else tuple(selection.diverse.tolist()),
        kept=tuple(selection.indices.tolist()),
    )
