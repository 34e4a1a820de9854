"""Prunes inside a transformers model that somebody else holds and calls."""

from __future__ import annotations

import functools
import inspect
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self
from weakref import WeakSet

import torch
from torch.nn.utils.rnn import pad_sequence

from prismprune.budget import TokenBudget
from prismprune.encoding import EncodedMedia, EncodingRequest, encode_pixels
from prismprune.errors import InvalidOptionError
from prismprune.families import family_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from torch import Tensor

    from prismprune.families.base import Family, Pixels, Processed, Visual
    from prismprune.vlm import Budget

Inputs = dict[str, Any]
REPLACED = ("generate", "forward")
"""Methods of the model that are replaced while it is pruned."""
PIXELS = "pixel_values"
"""What the names of all arguments with media begin with."""
CACHE, ASK = "past_key_values", "leave them out and give the whole conversation, its pixels too."
"""What is refused from turn to turn, and what to do in its place."""
IGNORED = -100
"""The label of what counts for no loss, in transformers."""


def prune(
    model: Any,
    token_budget: Budget = None,
    *,
    method: str = "prism",
    layout: str | None = None,
    **method_options: Any,
) -> Pruning:
    """Let a transformers model keep `token_budget` visual tokens of each row that it is given.

        with prismprune.prune(model, token_budget=64) as pruning:
            ids = model.generate(**processor(images=image, text=prompt, return_tensors="pt"))
        pruning.encoded[0].visual_tokens.kept

    Inputs are what the model's processor makes, with all placeholders. `generate` (also with beams, sampling,
    a streamer, in a pipeline) gives back sequences that begin with the caller's own prompts; `forward` gives
    the logits of the shorter sequence, padded at the same side, and `labels` are shortened with it. Both take
    `token_budget` for one call. Without media they are as ever. Budget and `layout` as for `PrunedVLM`.

    Raises `UnknownModelError` for a family without an adapter, `InvalidOptionError` for a model that is
    pruned already and for options out of their range, `InvalidBudgetError`, `UnknownMethodError`.
    """
    family = family_of(model.config.model_type)(model, None, layout)
    request = EncodingRequest((), TokenBudget.parse(token_budget), method, method_options)
    return Pruning(family, request)


class Pruning:
    """Prunes what a model sees until `remove`, or the end of a `with` block; made by `prune`.

    encoded: of the last call with media, an `EncodedMedia` a row of the batch: what was kept, and its cost.
    """

    def __init__(self, family: Family, request: EncodingRequest) -> None:
        self.encoded: tuple[EncodedMedia, ...] = ()
        self._pruned_caches: WeakSet[Any] = WeakSet()
        self._family = family
        self._request = request
        model = family.model
        if any(isinstance(getattr(vars(model).get(name), "pruning", None), Pruning) for name in REPLACED):
            raise InvalidOptionError("The model is pruned already; remove that pruning first.")
        # Another library, such as accelerate, may have put functions of its own in their place.
        self._before = {name: vars(model)[name] for name in REPLACED if name in vars(model)}
        for name, pruned in (("generate", self._generate), ("forward", self._forward)):
            setattr(model, name, self._wrapped(getattr(model, name), pruned))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def remove(self) -> None:
        """Leave the model as it was; a second call does nothing."""
        for name in REPLACED:
            if getattr(vars(self._family.model).get(name), "pruning", None) is self:
                delattr(self._family.model, name)
                if name in self._before:
                    setattr(self._family.model, name, self._before[name])

    def _wrapped(self, original: Callable[..., Any], pruned: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @functools.wraps(original)  # transformers reads the signature of `forward`
        def call(*args: Any, **inputs: Any) -> Any:
            given = _by_name(signature, args, inputs)
            budget = given.pop("token_budget", None)
            if not any(given.get(name) is not None for name in given if name.startswith(PIXELS)):
                if pruned == self._generate and given.get("past_key_values") in self._pruned_caches:
                    raise InvalidOptionError(
                        f"These {CACHE} are of a pruned prompt, shorter than its ids; {ASK}"
                    )
                return original(**given)
            request = self._request
            if budget is not None:
                request = replace(request, budget=TokenBudget.parse(budget))
            return pruned(original, given, request)

        call.pruning = self  # type: ignore[attr-defined]
        return call

    def _generate(self, original: Callable[..., Any], given: Inputs, request: EncodingRequest) -> Any:
        given["input_ids"] = (
            given.pop("inputs", None) if given.get("input_ids") is None else given["input_ids"]
        )
        pruned, asked = self._pruned(given, request, pad_left=True), given["input_ids"]
        output = original(**_relative(pruned, self._family.model.generation_config, asked.shape[1]))
        for cache in (given.get("past_key_values"), getattr(output, "past_key_values", None)):
            if cache is not None:
                self._pruned_caches.add(cache)
        sequences = output if torch.is_tensor(output) else output.sequences
        new = sequences[:, pruned["input_ids"].shape[1] :]
        prompts = asked.to(new.device).repeat_interleave(len(new) // len(asked), dim=0)
        whole = torch.cat([prompts, new], dim=1)
        if torch.is_tensor(output):
            return whole
        output.sequences = whole
        return output

    def _forward(self, original: Callable[..., Any], given: Inputs, request: EncodingRequest) -> Any:
        return original(**self._pruned(given, request, pad_left=False))

    def _pruned(self, inputs: Inputs, request: EncodingRequest, *, pad_left: bool) -> Inputs:
        """The same call with encoded media in place of pixels, and a placeholder for each of their tokens."""
        if inputs.get("input_ids") is None:
            raise InvalidOptionError("Pruning needs input_ids, to know which row has which media.")
        cache = inputs.get("past_key_values")
        if cache is not None and cache.get_seq_length():
            raise InvalidOptionError(f"Media behind {CACHE} of earlier tokens are not pruned; {ASK}")
        if inputs.get("position_ids") is not None:
            raise InvalidOptionError("position_ids count the tokens of the unpruned prompt; leave them out.")
        family, ids, mask = self._family, inputs["input_ids"], inputs.get("attention_mask")
        own = {name: inputs[name] for name in family.media_inputs if inputs.get(name) is not None}
        media, pixels = family.processed(own)
        rows = _by_row(family, ids, media)
        self.encoded = tuple(self._encode(request, media, pixels, rows))
        visuals = [_trainable(one.visuals) for one in self.encoded]
        shown = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        stays = [_collapsed(family, *row) for row in zip(ids, shown, rows, strict=True)]
        left = pad_left or not bool(shown[:, 0].all())
        rest = {name: value for name, value in inputs.items() if name not in family.media_inputs}
        features = family.visual_inputs([visual for row in visuals for visual in row])
        return rest | self._columns(inputs, stays, visuals, left=left) | features

    def _encode(
        self,
        request: EncodingRequest,
        media: Sequence[Processed],
        pixels: Sequence[Pixels],
        rows: Sequence[Sequence[Processed]],
    ) -> list[EncodedMedia]:
        """Each row as a request of its own."""
        given = [id(view) for medium in media for view in medium.views]
        dealt = [id(view) for row in rows for medium in row for view in medium.views]
        order = {view: place for place, view in enumerate(dealt)}
        moved = [replace(own, places=tuple(order[given[place]] for place in own.places)) for own in pixels]
        views = [
            [replace(view, media=place) for place, medium in enumerate(row) for view in medium.views]
            for row in rows
        ]
        return encode_pixels(self._family, [request] * len(rows), views, moved)

    def _columns(
        self, inputs: Inputs, stays: Sequence[Tensor], visuals: Sequence[Sequence[Visual]], *, left: bool
    ) -> Inputs:
        """Ids, mask, labels and positions of the rows, filled with `visuals` and padded to one length.

        stays: of each row, which of the caller's tokens [T] a template would have had.
        """
        family = self._family
        ids = [row[own] for row, own in zip(inputs["input_ids"], stays, strict=True)]
        filled = [family.filled(row.cpu(), own) for row, own in zip(ids, visuals, strict=True)]

        def padded(columns: Sequence[Tensor], fill: int) -> Tensor:
            side = "left" if left else "right"
            together = pad_sequence(list(columns), batch_first=True, padding_value=fill, padding_side=side)
            return together.to(inputs["input_ids"].device)

        made = {
            "input_ids": padded([prompt.token_ids for prompt in filled], self._pad_id),
            "attention_mask": padded([torch.ones_like(prompt.token_ids) for prompt in filled], 0),
        }
        if inputs.get("labels") is not None:
            labels = [row[own].cpu() for row, own in zip(inputs["labels"], stays, strict=True)]
            repeats = [family.repeats(row.cpu(), own) for row, own in zip(ids, visuals, strict=True)]
            made["labels"] = padded(list(map(torch.repeat_interleave, labels, repeats)), IGNORED)
        if filled[0].position_ids is not None:
            axes = [padded([prompt.positions[axis] for prompt in filled], 0) for axis in range(3)]
            made["position_ids"] = torch.stack(axes)
        return made

    @property
    def _pad_id(self) -> int:
        """Of what no row attends to: any id that is no placeholder."""
        return next(id_ for id_ in range(10) if id_ not in self._family.placeholder_ids.values())


def _by_name(signature: inspect.Signature, args: tuple[Any, ...], inputs: Inputs) -> Inputs:
    """The arguments of a call by their names."""
    named: Inputs = {}
    for name, value in signature.bind_partial(*args, **inputs).arguments.items():
        collects = signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
        named |= value if collects else {name: value}
    return named


def _relative(inputs: Inputs, configured: Any, prompt: int) -> Inputs:
    """`inputs` of `generate` whose bounds count no prompt: that of `prompt` tokens is shorter now."""
    config, made = inputs.get("generation_config") or configured, dict(inputs)
    for bound, least in (("max", 1), ("min", 0)):
        own, length = f"{bound}_new_tokens", made.pop(f"{bound}_length", None)
        if made.get(own) is None and getattr(config, own) is None:
            length = length or getattr(config, f"{bound}_length")
            if length:
                made[own] = max(least, length - prompt)
    return made


def _trainable(visuals: Sequence[Visual]) -> list[Visual]:
    """The same, but not of inference mode: a loss may follow."""
    return [replace(visual, features=visual.features.clone()) for visual in visuals]


def _by_row(family: Family, ids: Tensor, media: Sequence[Processed]) -> list[list[Processed]]:
    """Deal out media to the rows of `ids` [B, T] whose placeholders are theirs, in the prompt's order."""
    waiting = {
        modality: deque(medium for medium in media if medium.modality == modality)
        for modality in family.placeholder_ids
    }
    rows = []
    for row in ids:
        own: list[tuple[int, Processed]] = []
        for modality, placeholder in family.placeholder_ids.items():
            marks, first = (row == placeholder).nonzero().flatten().tolist(), 0
            while first < len(marks) and waiting[modality]:
                medium = waiting[modality].popleft()
                own.append((marks[first], medium))
                first += medium.placeholders
            if first != len(marks):
                raise InvalidOptionError("The prompt's placeholders do not belong to these pixels.")
        rows.append([medium for _, medium in sorted(own, key=lambda placed: placed[0])])
    if any(waiting.values()):
        raise InvalidOptionError("There are more pixels than placeholders in the prompt.")
    return rows


def _collapsed(family: Family, ids: Tensor, shown: Tensor, media: Sequence[Processed]) -> Tensor:
    """Which tokens of a row [T] stay so that each medium has one placeholder, and padding none."""
    stays = shown.clone()
    for modality, placeholder in family.placeholder_ids.items():
        marks, first = (ids == placeholder).nonzero().flatten(), 0
        for medium in media:
            if medium.modality == modality:
                stays[marks[first + 1 : first + medium.placeholders]] = False
                first += medium.placeholders
    return stays
