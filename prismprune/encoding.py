"""Media to the visual tokens that stay: tower, scores, budget, selection, and only then the projector.

No question takes part, so one encoding serves every question about its media.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from prismprune.budget import TokenBudget
from prismprune.errors import InvalidOptionError
from prismprune.meters import Stopwatch
from prismprune.results import PartMap, Timings, VisualTokens
from prismprune.selection import Scores, Selection, Selector, selector
from prismprune.selection.base import take

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from prismprune.families.base import Family, Pixels, Reading, View
    from prismprune.media import Clip, Picture

NOT_PRUNED = "none"
"""The method that is reported where every token stayed."""


@dataclass(frozen=True, slots=True)
class EncodingRequest:
    """Media of one request and how many of their visual tokens stay.

    Raises `InvalidOptionError` without media, and whatever `selector` raises for the method and its options.
    """

    media: tuple[Picture | Clip, ...]
    budget: TokenBudget = field(default_factory=TokenBudget.all)
    method: str = "prism"
    method_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.media:
            raise InvalidOptionError("A request needs at least one picture or video.")
        self.selector()

    def selector(self) -> Selector:
        return selector(self.method, **self.method_options)


@dataclass(frozen=True, slots=True)
class EncodedMedia:
    """The visual tokens that stay, ready for the language model: one [K, width] a view, in prompt order.

    `timings` holds the stages from decoding to selection; those shared by a batch are the batch's.
    """

    features: tuple[Tensor, ...]
    visual_tokens: VisualTokens
    token_map: tuple[PartMap, ...]
    timings: Timings
    warnings: tuple[str, ...] = ()


@dataclass(slots=True)
class _Part:
    """One view on its way: its row in what the tower read, how many of its patches stay, and which.

    `keep` and `selection` None: every token stays, also one that is no patch. `tokens` [K, d] are those that
    stay, as the projector takes them.
    """

    view: View
    pixels: Pixels
    reading: Reading
    row: int
    tokens: Tensor
    keep: int | None = None
    selection: Selection | None = None


@torch.inference_mode()
def encode(family: Family, requests: Sequence[EncodingRequest]) -> list[EncodedMedia]:
    """Encode all requests together: views of one size share a tower run, and those of equal K a selection."""
    watch = Stopwatch(family.model.device)
    views = [family.views(request.media) for request in requests]
    pixels = family.preprocess([view for own in views for view in own])
    preprocess_ms = watch.lap_ms()
    readings = [family.read(group) for group in pixels]
    vision_ms = watch.lap_ms()
    parts = _by_request(views, pixels, readings)
    _share_budgets(requests, parts)
    _select(requests, parts)
    select_ms = watch.lap_ms()
    features = _project(family, parts)
    vision_ms += watch.lap_ms()
    shared = Timings(preprocess_ms=preprocess_ms, vision_ms=vision_ms, select_ms=select_ms)
    return [_encoded(*one, shared) for one in zip(requests, parts, features, strict=True)]


def _by_request(
    views: Sequence[Sequence[View]], pixels: Sequence[Pixels], readings: Sequence[Reading]
) -> list[list[_Part]]:
    """Sort what was read by size back into the order of the requests and their views."""
    flat = [view for own in views for view in own]
    parts = {
        place: _Part(flat[place], group, reading, row, reading.tokens[row])
        for group, reading in zip(pixels, readings, strict=True)
        for row, place in enumerate(group.places)
    }
    in_order = iter([parts[place] for place in range(len(flat))])
    return [[next(in_order) for _ in own] for own in views]


def _share_budgets(requests: Sequence[EncodingRequest], parts: Sequence[Sequence[_Part]]) -> None:
    for request, own in zip(requests, parts, strict=True):
        original = _original(own)
        if request.budget.resolve(original) < original:
            candidates = [part.reading.patches.shape[1] for part in own]
            for part, keep in zip(own, request.budget.split(candidates), strict=True):
                part.keep = keep


def _original(parts: Sequence[_Part]) -> int:
    """Visual tokens without pruning."""
    return sum(part.reading.tokens.shape[1] for part in parts)


def _select(requests: Sequence[EncodingRequest], parts: Sequence[Sequence[_Part]]) -> None:
    """Select for all views of one size, method and number to keep at once; compute each attention once."""
    by_reading: dict[int, dict[tuple[Selector, int], list[_Part]]] = defaultdict(lambda: defaultdict(list))
    for request, own in zip(requests, parts, strict=True):
        choose = request.selector()
        for part in own:
            if part.keep is not None:
                by_reading[id(part.reading)][choose, part.keep].append(part)
    for groups in by_reading.values():
        attention: Tensor | None = None
        for (choose, keep), group in groups.items():
            attention = group[0].reading.attention() if attention is None else attention
            _select_group(choose, keep, group, attention)


def _select_group(choose: Selector, keep: int, group: Sequence[_Part], attention: Tensor) -> None:
    rows = [part.row for part in group]
    patches = group[0].reading.patches[rows]
    selection = choose(Scores(attention[rows], patches, group[0].pixels.grid), keep)
    tokens = take(patches, selection.indices)
    on_host = Selection(
        selection.indices.cpu(),
        None if selection.salient is None else selection.salient.cpu(),
        None if selection.diverse is None else selection.diverse.cpu(),
    )
    for row, part in enumerate(group):
        part.tokens, part.selection = tokens[row], on_host.image(row)


def _project(family: Family, parts: Sequence[Sequence[_Part]]) -> list[tuple[Tensor, ...]]:
    """Project the survivors of the whole batch in one call: a [K, width] a view."""
    survivors = [part.tokens for own in parts for part in own]
    projected = family.project(torch.cat(survivors))
    by_view = iter(torch.split(projected, [len(tokens) for tokens in survivors]))
    return [tuple(next(by_view) for _ in own) for own in parts]


def _encoded(
    request: EncodingRequest, parts: Sequence[_Part], features: tuple[Tensor, ...], shared: Timings
) -> EncodedMedia:
    token_map = tuple(_part_map(part) for part in parts)
    visual_tokens = _visual_tokens(request, parts, token_map)
    silent = request.budget.is_all or visual_tokens.method != NOT_PRUNED
    return EncodedMedia(
        features=features,
        visual_tokens=visual_tokens,
        token_map=token_map,
        timings=replace(shared, decode_ms=sum(media.decode_ms for media in request.media)),
        warnings=() if silent else (_why_nothing(request.budget, visual_tokens.original),),
    )


def _visual_tokens(
    request: EncodingRequest, parts: Sequence[_Part], token_map: Sequence[PartMap]
) -> VisualTokens:
    budget, original = request.budget, _original(parts)
    salient = [part.salient for part in token_map if part.salient is not None]
    diverse = [part.diverse for part in token_map if part.diverse is not None]
    return VisualTokens(
        original=original,
        kept=sum(len(part.tokens) for part in parts),
        salient=sum(map(len, salient)) if salient else None,
        diverse=sum(map(len, diverse)) if diverse else None,
        budget=None if budget.is_all else budget.tokens or budget.resolve(original),
        method=NOT_PRUNED if all(part.keep is None for part in parts) else request.method,
    )


def _why_nothing(budget: TokenBudget, original: int) -> str:
    if budget.tokens is None:
        keeps = f"keep_ratio {budget.ratio:g} keeps all"
    else:
        keeps = f"token_budget {budget.tokens} is at or above the"
    return f"{keeps} {original} visual tokens of the media; nothing was pruned"


def _part_map(part: _Part) -> PartMap:
    selection = part.selection or Selection(torch.arange(part.reading.patches.shape[1]))
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
