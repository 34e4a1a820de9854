"""Prunes inside a transformers model that somebody else holds and calls."""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn, Self
from weakref import WeakValueDictionary

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, MaxLengthCriteria
from transformers.generation import logits_process

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
MARK = "pruned_prompts"
"""Attribute of keys and values of pruned prompts: `_Prompts`. Their copies have it too."""
OWN_POSITIONS = "position_ids count the tokens of the unpruned prompt; leave them out."
TOWER = ("vision_feature_layer", "vision_feature_select_strategy")
"""Of a model's config, and of a call: read when the model is pruned."""
IGNORED = -100
"""The label of what counts for no loss, in transformers."""
COUNTING = (
    logits_process.ExponentialDecayLengthPenalty,
    logits_process.ForcedEOSTokenLogitsProcessor,
    logits_process.MinLengthLogitsProcessor,
    logits_process.MinNewTokensLengthLogitsProcessor,
    logits_process.PrefixConstrainedLogitsProcessor,
)
"""Processors of transformers for which it matters where the prompt ends."""
_pruned_now: WeakValueDictionary[int, Pruning] = WeakValueDictionary()
"""By the `id` of its model; other libraries may have hidden what is in the model."""


def prune(
    model: Any,
    token_budget: Budget = None,
    *,
    keep_ratio: float | None = None,
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
    `token_budget` or `keep_ratio` for one call. Without media they are as ever, also behind the
    `past_key_values` that `forward` gave back. Budget and `layout` as for `PrunedVLM`; `keep_ratio`, a share
    in (0, 1], stands in place of a number of tokens.

    A loss has gradients for the language model and for what projects the survivors, and none for the vision
    tower (of Qwen2.5-VL, its merger too), which a selection cannot give: a warning says so, once, where
    parameters of it ask for one. `model` may be wrapped by peft. While it is pruned, it cannot be copied or
    pickled, a copy would be the original in disguise; its `state_dict` and `save_pretrained` are as ever.

    Raises `UnknownModelError` for a family without an adapter, `InvalidOptionError` for a model that does not
    generate, one that is pruned already and for options out of their range, `InvalidBudgetError`,
    `UnknownMethodError`.
    """
    budget, own = TokenBudget.parse(token_budget, keep_ratio=keep_ratio), _unwrapped(model)
    family = family_of(own.config.model_type)(own, None, layout)
    return Pruning(family, EncodingRequest((), budget, method, method_options))


class Pruning:
    """Prunes what a model sees until `remove`, or the end of a `with` block; made by `prune`.

    encoded: of the last call with media, an `EncodedMedia` a row of the batch: what was kept, and its cost.
    """

    def __init__(self, family: Family, request: EncodingRequest) -> None:
        self.encoded: tuple[EncodedMedia, ...] = ()
        self._warned = self._ended = False
        self._family = family
        self._request = request
        model = family.model
        if id(model) in _pruned_now:
            raise InvalidOptionError("The model is pruned already; remove that pruning first.")
        _pruned_now[id(model)] = self
        self._tower = self._configured
        # Another library, such as accelerate, may have put functions of its own in their place.
        self._before = {name: vars(model)[name] for name in REPLACED if name in vars(model)}
        self._installed = {
            name: _Replaced(self, getattr(model, name), pruned)
            for name, pruned in (("generate", self._generate), ("forward", self._forward))
        }
        for name, installed in self._installed.items():
            setattr(model, name, installed)

    def __enter__(self) -> Self:
        if self._ended:
            raise InvalidOptionError("This pruning has ended; call prune again.")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def remove(self) -> None:
        """Leave the model as it was; a second call does nothing.

        What another library has put around a method since stays, around the model's own from now on.
        """
        if self._ended:
            return
        self._ended, model = True, self._family.model
        del _pruned_now[id(model)]
        for name, installed in self._installed.items():
            if vars(model).get(name) is installed:
                delattr(model, name)
                if name in self._before:
                    setattr(model, name, self._before[name])

    def call(
        self, original: Callable[..., Any], pruned: Callable[..., Any], args: tuple[Any, ...], inputs: Inputs
    ) -> Any:
        """What the model's `original` method gives, or `pruned` in its place where there are media."""
        if self._ended:
            return original(*args, **inputs)
        given = _by_name(inspect.signature(original), args, inputs)
        budget, ratio = given.pop("token_budget", None), given.pop("keep_ratio", None)
        if not any(given.get(name) is not None for name in given if name.startswith(PIXELS)):
            return original(**_behind_prompts(given, generates=pruned == self._generate))
        request = self._request
        if budget is not None or ratio is not None:
            request = replace(request, budget=TokenBudget.parse(budget, keep_ratio=ratio))
        return pruned(original, given, request)

    @property
    def _configured(self) -> dict[str, Any]:
        return {name: getattr(self._family.model.config, name, None) for name in TOWER}

    def _generate(self, original: Callable[..., Any], given: Inputs, request: EncodingRequest) -> Any:
        given["input_ids"] = (
            given.pop("inputs", None) if given.get("input_ids") is None else given["input_ids"]
        )
        configured = self._family.model.generation_config
        if given.get("attention_mask") is None and given["input_ids"] is not None:
            given["attention_mask"] = _of_padding(given, configured)
        with torch.no_grad():  # as in transformers
            pruned, prompts = self._pruned(given, request, pad_left=True)
        asked = prompts.asked.shape[1]
        made = _relative(pruned, configured, asked)
        output = original(**(made | _of_whole_prompts(made, configured, prompts)))
        prompts.mark(given.get(CACHE), getattr(output, CACHE, None))
        if torch.is_tensor(output):
            return prompts.whole(output)
        output.sequences = prompts.whole(output.sequences)
        return output

    def _forward(self, original: Callable[..., Any], given: Inputs, request: EncodingRequest) -> Any:
        pruned, prompts = self._pruned(given, request, pad_left=False)
        output = original(**pruned)
        returned = output if isinstance(output, tuple) else (getattr(output, CACHE, None),)
        prompts.mark(given.get(CACHE), *returned)
        return output

    def _pruned(self, inputs: Inputs, request: EncodingRequest, *, pad_left: bool) -> tuple[Inputs, _Prompts]:
        """The same call with encoded media in place of pixels, and a placeholder for each of their tokens."""
        if inputs.get("input_ids") is None:
            raise InvalidOptionError("Pruning needs input_ids, to know which row has which media.")
        cache = inputs.get("past_key_values")
        if cache is not None and cache.get_seq_length():
            raise InvalidOptionError(f"Media behind {CACHE} of earlier tokens are not pruned; {ASK}")
        if inputs.get("position_ids") is not None:
            raise InvalidOptionError(OWN_POSITIONS)
        if torch.is_tensor(inputs.get("logits_to_keep")):
            raise InvalidOptionError("logits_to_keep as indices counts the unpruned prompt's; give a number.")
        self._check_tower(inputs)
        family, ids, mask = self._family, inputs["input_ids"], inputs.get("attention_mask")
        own = {name: inputs[name] for name in family.media_inputs if inputs.get(name) is not None}
        media, pixels = family.processed(own)
        rows = _by_row(family, ids, media)
        encoded = self._encode(request, media, pixels, rows)
        self.encoded = tuple(replace(one, visuals=tuple(map(_detached, one.visuals))) for one in encoded)
        visuals = [one.visuals for one in encoded]
        self._warn_of_untrained([visual for row in visuals for visual in row])
        shown = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        stays = [_collapsed(family, *row) for row in zip(ids, shown, rows, strict=True)]
        left = pad_left or bool(shown[:, -1].all())  # what follows a row is to follow its last token
        rest = {name: value for name, value in inputs.items() if name not in family.media_inputs}
        features = family.visual_inputs([visual for row in visuals for visual in row])
        columns, following = self._columns(inputs, stays, visuals, left=left)
        return rest | columns | features, _Prompts(ids, columns["attention_mask"], following)

    def _check_tower(self, inputs: Inputs) -> None:
        """Raises InvalidOptionError where another layer of the tower is asked for than pruning looks at."""
        for name, value in self._tower.items():
            asked = inputs.get(name)
            if self._configured[name] != value or (asked is not None and asked != value):
                raise InvalidOptionError(
                    f"{name} is {value} while the model is pruned; set it in its config before."
                )

    def _warn_of_untrained(self, visuals: Sequence[Visual]) -> None:
        """Once: parameters that ask for a gradient and will not get one."""
        if self._warned or not torch.is_grad_enabled():
            return
        family = self._family
        names = family.outside["vision"]
        if not any(visual.features.requires_grad for visual in visuals):
            names += family.outside["projector"]  # part of the tower, or asking for nothing
        modules = {name: family.model.get_submodule(name) for name in names}
        untrained = [
            name for name, own in modules.items() if any(each.requires_grad for each in own.parameters())
        ]
        if untrained:
            self._warned = True
            warnings.warn(
                f"No gradient reaches {', '.join(untrained)}: selecting tokens has none. Freeze it with "
                "requires_grad_(False), or use torch.no_grad() where nothing is trained.",
                stacklevel=2,
            )

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
    ) -> tuple[Inputs, Tensor | None]:
        """Ids, mask, labels and positions of the rows, filled with `visuals` and padded to one length.

        Behind them the position [B] of the token after each row, if the model does not count by itself.
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
        if filled[0].position_ids is None:
            return made, None
        axes = [padded([prompt.positions[axis] for prompt in filled], 0) for axis in range(3)]
        made["position_ids"] = torch.stack(axes)
        return made, torch.tensor([prompt.following for prompt in filled])

    @property
    def _pad_id(self) -> int:
        """Of what no row attends to: any id that is no placeholder."""
        return next(id_ for id_ in range(10) if id_ not in self._family.placeholder_ids.values())


class _Replaced:
    """A method of a model while it is pruned; an object, as functions are copied without a word."""

    def __init__(self, pruning: Pruning, original: Callable[..., Any], pruned: Callable[..., Any]) -> None:
        functools.update_wrapper(self, original)  # transformers reads the signature of `forward`
        self._pruning, self._original, self._pruned = pruning, original, pruned

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        return self._pruning.call(self._original, self._pruned, args, inputs)

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise InvalidOptionError(
            "Remove the pruning before the model is copied: its copy would call this one."
        )

    def __reduce__(self) -> NoReturn:
        raise InvalidOptionError("Remove the pruning before the model is pickled, or save its state_dict.")


@dataclass(frozen=True, slots=True)
class _Prompts:
    """The prompts of one call.

    asked: [B, T], the caller's ids. mask: [B, P], of the pruned prompts. following: [B], the position of the
    token after each; None: the model counts tokens by itself.
    """

    asked: Tensor
    mask: Tensor
    following: Tensor | None

    def mark(self, *caches: Any) -> None:
        """Remember that these keys and values, as far as they are any, are of these prompts."""
        for cache in caches:
            if isinstance(cache, Cache):
                setattr(cache, MARK, self)
                cache.__class__ = _following(type(cache))  # type: ignore[arg-type]  # torch's `__hash__`

    def of_rows(self, rows: Tensor, cached: int) -> _Prompts:
        """Those of `rows` [R], of a cache of `cached` rows: of each prompt as many, one behind the other."""
        rows = rows.cpu() // (cached // len(self.mask))
        following = None if self.following is None else self.following[rows]
        asked, mask = (own[rows.to(own.device)] for own in (self.asked, self.mask))
        return _Prompts(asked, mask, following)

    def whole(self, ids: Tensor) -> Tensor:
        """Pruned prompts and new tokens [n * B, P + new] behind the caller's prompts: [n * B, T + new]."""
        asked = self.asked.to(ids.device).repeat_interleave(len(ids) // len(self.asked), dim=0)
        return torch.cat([asked, ids[:, self.mask.shape[1] :]], dim=1)

    def fitted(self, own: Any) -> Any:
        """A processor or criterion of the caller's `generate`, as it is for these prompts."""
        whole = self.asked.shape[1]
        cut = whole - self.mask.shape[1]
        # Those of transformers keep their type, by which they replace what `generate` itself would add.
        if type(own) is MaxLengthCriteria:
            return MaxLengthCriteria(own.max_length - cut, own.max_position_embeddings)
        if type(own) is logits_process.SuppressTokensAtBeginLogitsProcessor:
            return _with(own, begin_index=own.begin_index - cut)
        if type(own) is logits_process.RepetitionPenaltyLogitsProcessor:
            ignored = own.prompt_ignore_length or 0
            if ignored >= whole:
                return _with(own, prompt_ignore_length=ignored - cut)
            return self._shown_whole(own) if ignored else own
        of_transformers = type(own).__module__.startswith("transformers.")
        return own if of_transformers and not isinstance(own, COUNTING) else self._shown_whole(own)

    def _shown_whole(self, own: Callable[..., Any]) -> Callable[..., Any]:
        """A function, as transformers would ask an object's `__call__` for the names of its arguments."""

        def call(ids: Tensor, scores: Any, **options: Any) -> Any:
            return own(self.whole(ids), scores, **options)

        return call

    def continued(self, given: Inputs, cached: int) -> Inputs:
        """`given` to `forward` behind `cached` tokens of each row, with mask and positions that fit them."""
        new = given.get("inputs_embeds") if given.get("input_ids") is None else given["input_ids"]
        if new is None:
            return given  # transformers says what is missing
        rows, length = new.shape[:2]
        pruned, seen = self.mask.shape[1], given.get("attention_mask")
        since = cached - pruned + length
        if cached < pruned or rows % len(self.mask):
            raise InvalidOptionError(f"These {CACHE} of a pruned prompt have been cut; {ASK}")
        if seen is not None and seen.shape[1] - since not in (pruned, self.asked.shape[1]):
            raise InvalidOptionError(
                "attention_mask is of the whole prompt and all tokens behind it, or is None."
            )

        def each(values: Tensor) -> Tensor:
            return values.to(new.device).repeat_interleave(rows // len(self.mask), dim=0)

        behind = new.new_ones(rows, since, dtype=torch.long) if seen is None else seen[:, -since:].long()
        made, mask = dict(given), each(self.mask)
        if seen is not None or not bool(mask.all()):
            made["attention_mask"] = torch.cat([mask, behind], dim=1)
        if self.following is not None:
            positions = each(self.following)[:, None] + behind.cumsum(1) - 1
            made["position_ids"] = positions[:, -length:].expand(3, -1, -1)
        return made


class _Following:
    """Before a class of keys and values: what is known of their prompts follows the rows that they go to."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._take(beam_idx)
        super().reorder_cache(beam_idx)  # type: ignore[misc]

    def batch_select_indices(self, indices: Tensor) -> None:
        self._take(indices)
        super().batch_select_indices(indices)  # type: ignore[misc]

    def _take(self, rows: Tensor) -> None:
        prompts: _Prompts | None = getattr(self, MARK, None)
        if prompts is not None:
            cached = len(self.layers[0].keys)  # type: ignore[attr-defined]
            if rows.dtype == torch.bool:
                rows = rows.nonzero().flatten()
            setattr(self, MARK, prompts.of_rows(rows, cached))


@functools.cache
def _following(kind: type[Cache]) -> type[Cache]:
    """`kind` with `_Following`, by the same name: an object of it stays one, and so do its copies."""
    return kind if issubclass(kind, _Following) else type(kind.__name__, (_Following, kind), {})


def _behind_prompts(given: Inputs, *, generates: bool) -> Inputs:
    """The arguments of a call without media, as they are behind keys and values of pruned prompts."""
    cache = given.get(CACHE)
    prompts: _Prompts | None = getattr(cache, MARK, None)
    if cache is None or prompts is None:
        return given
    cached = int(cache.get_seq_length())
    if not cached:  # emptied, for another prompt
        delattr(cache, MARK)
        return given
    if generates:
        raise InvalidOptionError(f"These {CACHE} are of a pruned prompt, shorter than its ids; {ASK}")
    if given.get("position_ids") is not None:
        raise InvalidOptionError(OWN_POSITIONS)
    return prompts.continued(given, cached)


def _of_whole_prompts(inputs: Inputs, configured: Any, prompts: _Prompts) -> Inputs:
    """The caller's criteria, processors and prefix function in `inputs`, which get to see whole prompts."""
    made: Inputs = {}
    for name in ("logits_processor", "stopping_criteria"):
        if inputs.get(name) is not None:
            made[name] = type(inputs[name])(prompts.fitted(own) for own in inputs[name])
    allowed = inputs.get("prefix_allowed_tokens_fn")
    if allowed is not None:
        pruned, beams = prompts.mask.shape[1], _setting(inputs, configured, "num_beams") or 1
        # With beams a row is of a prompt; without, each of the sequences that a prompt is to have is a row.
        rows = 1 if beams > 1 else _setting(inputs, configured, "num_return_sequences") or 1

        def prefixed(row: int, ids: Tensor) -> Any:
            return allowed(row, torch.cat([prompts.asked[row // rows].to(ids.device), ids[pruned:]]))

        made["prefix_allowed_tokens_fn"] = prefixed
    return made


def _unwrapped(model: Any) -> Any:
    """The model that generates, out of one of peft's."""
    own = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not (hasattr(own, "config") and hasattr(own, "generate")):
        raise InvalidOptionError(
            "prune takes a model that generates, as transformers' AutoModelForImageTextToText loads it (that "
            f"of a PrunedVLM is its `model`), also wrapped by peft; this is a {type(own).__name__}."
        )
    return own


def _by_name(signature: inspect.Signature, args: tuple[Any, ...], inputs: Inputs) -> Inputs:
    """The arguments of a call by their names."""
    named: Inputs = {}
    for name, value in signature.bind_partial(*args, **inputs).arguments.items():
        collects = signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
        named |= value if collects else {name: value}
    return named


def _with(own: Any, **attributes: Any) -> Any:
    made = copy.copy(own)
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def _setting(inputs: Inputs, configured: Any, name: str) -> Any:
    """Of `generate`: the call's argument, else of the config that it was given, else of the model's own."""
    given = (
        inputs.get(name),
        *(getattr(each, name, None) for each in (inputs.get("generation_config"), configured)),
    )
    return next((value for value in given if value is not None), None)


def _of_padding(inputs: Inputs, configured: Any) -> Tensor | None:
    """The mask that transformers' `generate` takes where none is given: all but padding that ends nothing."""
    pad, ends = (_setting(inputs, configured, f"{name}_token_id") for name in ("pad", "eos"))
    if pad is None or pad in ([] if ends is None else torch.as_tensor(ends).flatten().tolist()):
        return None
    ids: Tensor = inputs["input_ids"]
    return ids.ne(pad).long()


def _relative(inputs: Inputs, configured: Any, prompt: int) -> Inputs:
    """`inputs` of `generate` whose bounds count no prompt: that of `prompt` tokens is shorter now."""
    made = dict(inputs)
    for bound, least in (("max", 1), ("min", 0)):
        length, name = made.pop(f"{bound}_length", None), f"{bound}_new_tokens"
        if _setting(made, configured, name) is None:
            length = length or _setting(made, configured, f"{bound}_length")
            if length:
                if length - prompt < least and bound == "max":  # as transformers says it
                    raise ValueError(
                        f"Input length of input_ids is {prompt}, but `max_length` is set to {length}."
                    )
                made[name] = max(least, length - prompt)
    return made


def _detached(visual: Visual) -> Visual:
    """The same without the graph of a loss, which would stay in memory with it."""
    return replace(visual, features=visual.features.detach())


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
