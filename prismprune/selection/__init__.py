"""Which visual tokens stay: the methods, by name. A new one is a file here and a name in `_PLAIN`."""

from __future__ import annotations

from inspect import signature
from typing import TYPE_CHECKING, Any

from prismprune.budget import TokenBudget
from prismprune.errors import InvalidOptionError, UnknownMethodError
from prismprune.selection.base import Scores, Selection, Selector
from prismprune.selection.divprune import DivPrune
from prismprune.selection.fps import Fps
from prismprune.selection.prism import Prism
from prismprune.selection.promprune import PromPrune
from prismprune.selection.prumerge_plus import PruMergePlus
from prismprune.selection.random import Random
from prismprune.selection.saliency import Saliency
from prismprune.selection.uniform import Uniform
from prismprune.selection.visionzip import VisionZip
from prismprune.selection.vispruner import VisPruner

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["METHODS", "Scores", "Selection", "Selector", "select", "selector"]

_PLAIN = (Prism, Saliency, Uniform, Random, Fps)
_RIVALS = (VisionZip, VisPruner, DivPrune, PruMergePlus, PromPrune)
_METHODS: dict[str, type[Selector]] = {method.name: method for method in (*_PLAIN, *_RIVALS)}
METHODS = tuple(_METHODS)
"""Names of the methods, the default one first."""


def selector(name: str = "prism", /, **options: Any) -> Selector:
    """The method of that name with its options, ready to be called.

    Raises `UnknownMethodError`, whose message lists the known ones, and `InvalidOptionError` for an option
    that the method does not have or a value out of its range.
    """
    if name not in _METHODS:
        raise UnknownMethodError(f"Unknown method; known are {', '.join(METHODS)}.")
    known = list(signature(_METHODS[name]).parameters)
    if unknown := sorted(options.keys() - known):
        raise InvalidOptionError(
            f"{name} takes {', '.join(known) or 'no options'}, not {', '.join(unknown)}."
        )
    return _METHODS[name](**options)


def select(
    attention: Tensor,
    features: Tensor,
    budget: int | str | TokenBudget | None,
    method: str = "prism",
    *,
    keys: Tensor | None = None,
    projected: Tensor | None = None,
    **options: Any,
) -> Selection:
    """Choose which visual tokens of an image stay, or of each of B images of one size.

    attention: [H, N] or [B, H, N], one row a head: what the CLS query attends to.
    features: [N, d] or [B, N, d]: those that the projector takes.
    budget: tokens that stay of each image: a number, "all", None (all) or a `TokenBudget`.
    keys: [H, N, head_dim] or [B, H, N, head_dim], for "visionzip" and "prumerge_plus".
    projected: [N, width] or [B, N, width], for "divprune" and "promprune"; None: `features` stand for them.
    options: the method's own, such as `salient_share`, `pool_factor` and `fps_start` of "prism".

    The selection's tensors are [K] for one image and [B, K] for a batch, on the features' device; a method
    that merges also gives the weights that `Selection.tokens` applies. Raises `InvalidBudgetError`,
    `UnknownMethodError`, `InvalidOptionError` or `InvalidScoresError`.
    """
    choose = selector(method, **options)
    tokens = TokenBudget.parse(budget)
    single = attention.ndim == 2 and features.ndim == 2
    if single:
        attention, features = attention[None], features[None]
        keys, projected = (None if tensor is None else tensor[None] for tensor in (keys, projected))
    scores = Scores(attention, features, keys=keys, projected=projected)
    selection = choose(scores, tokens.resolve(scores.candidates))
    return selection.image(0) if single else selection
