"""What a selection method gets and gives, and the ordering that all methods share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch

from prismprune.errors import InvalidOptionError, InvalidScoresError
from prismprune.kinds import is_number, is_whole

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Scores:
    """What a vision tower says about the patches of B images of one size, N patches each.

    attention: [B, H, N], one row a head, any floating dtype. For towers with a CLS token: the attention of
        the CLS query to each patch.
    features: [B, N, d], any floating dtype: those that the projector takes.
    grid: (rows, columns) of the patches in raster order, rows * columns = N; None where they form none.
    keys: [B, H, N, head_dim], of the block that attention is read from.
    projected: [B, N, width], the features as the language model gets them; None: `features` stand for them.

    Raises `InvalidScoresError` where the shapes do not belong together.
    """

    attention: Tensor
    features: Tensor
    grid: tuple[int, int] | None = None
    keys: Tensor | None = None
    projected: Tensor | None = None

    def __post_init__(self) -> None:
        attention, features = tuple(self.attention.shape), tuple(self.features.shape)
        if len(attention) != 3 or len(features) != 3:
            raise InvalidScoresError(
                f"Expected attention [B, H, N] and features [B, N, d], got {attention}, {features}."
            )
        if (attention[0], attention[2]) != features[:2] or attention[1] == 0:
            raise InvalidScoresError(
                f"Attention {attention} and features {features} are not of the same patches."
            )
        if self.grid is not None and self.grid[0] * self.grid[1] != features[1]:
            raise InvalidScoresError(f"A grid of {self.grid} does not hold {features[1]} patches.")
        self._check("keys", self.keys, attention)
        self._check("projected", self.projected, features[:2])

    @staticmethod
    def _check(name: str, values: Tensor | None, leading: tuple[int, ...]) -> None:
        if values is not None and tuple(values.shape[:-1]) != leading:
            raise InvalidScoresError(
                f"{name} of shape {tuple(values.shape)} do not begin with {leading}, as the others do."
            )

    @property
    def images(self) -> int:
        """B, the number of images, crops or frames."""
        return self.features.shape[0]

    @property
    def candidates(self) -> int:
        """N, the patches of each."""
        return self.features.shape[1]

    def keys_of(self, method: str) -> Tensor:
        """`keys`, for a method that cannot do without them; raises `InvalidScoresError` if there are none."""
        if self.keys is None:
            raise InvalidScoresError(f"{method} needs the keys of the block that attention is read from.")
        return self.keys

    @property
    def embeddings(self) -> Tensor:
        """`projected`, or the `features` that stand for them."""
        return self.features if self.projected is None else self.projected


@dataclass(frozen=True, slots=True)
class Selection:
    """The kept patches of B images, as raster indices: int64, ascending, without duplicates.

    indices: [B, K]. salient: [B, K_sal] and diverse: [B, K_div] part `indices` in two; both are None where
    the method does not tell them apart.
    weights: [B, K, N], float32, of a method that merges: the token at `indices` becomes weights @ features.
        None where the kept tokens stay as they are.
    """

    indices: Tensor
    salient: Tensor | None = None
    diverse: Tensor | None = None
    weights: Tensor | None = None

    def image(self, index: int) -> Selection:
        """The selection of one image of the batch, without the dimension B."""
        parts = (self.salient, self.diverse, self.weights)
        return Selection(self.indices[index], *(None if part is None else part[index] for part in parts))

    def tokens(self, features: Tensor) -> Tensor:
        """What stays of the `features` that were selected from, merged or as it was.

        [B, N, d] gives [B, K, d]; of one image, whose indices are [K], [N, d] gives [K, d].
        """
        if self.weights is None:
            single = self.indices.ndim == 1
            return features.index_select(-2, self.indices) if single else take(features, self.indices)
        return (self.weights @ features.float()).to(features.dtype)


class Selector(Protocol):
    """A method: which `k` patches of each image stay.

    `k` of at least the number of patches keeps all, and 0 keeps none. An image's selection does not depend on
    its neighbors in the batch. Ties go to the lower raster index, on every device.

    needs_keys, needs_projected: the method reads `Scores.keys` or `Scores.projected`, which are computed for
    no other. looks_at_few: it knows by attention alone which features it needs; the others may be zeros.
    """

    __slots__ = ()

    name: ClassVar[str]
    needs_keys: ClassVar[bool] = False
    needs_projected: ClassVar[bool] = False
    looks_at_few: ClassVar[bool] = False

    def looks_at(self, attention: Tensor, k: int) -> Tensor | None:
        """Patches [B, M] whose features it compares or may keep, by attention [B, H, N]; None: all."""
        del attention, k
        return None

    def __call__(self, scores: Scores, k: int) -> Selection: ...


def nothing_of(scores: Scores, *, merges: bool = False) -> Selection:
    """The selection of no token, for methods whose statistics need one to look at."""
    attention = scores.attention
    indices = torch.empty(scores.images, 0, dtype=torch.long, device=attention.device)
    weights = (
        attention.new_empty(scores.images, 0, scores.candidates, dtype=torch.float32) if merges else None
    )
    return Selection(indices, weights=weights)


def exact(values: Tensor) -> Tensor:
    """`values` in float64, to compute in; results are rounded to float32 before they are compared.

    So tokens that differ in nothing but the rounding of a sum, which changes with the device and even from
    column to column, compare as equal, and the raster decides. Apple's GPUs have no float64: float32 there.
    """
    return values.to(torch.float32 if values.device.type == "mps" else torch.float64)


def head_mean(attention: Tensor) -> Tensor:
    """Mean over heads of attention [B, H, N]: [B, N], float32."""
    return exact(attention).mean(dim=1).float()


def head_variance(attention: Tensor) -> Tensor:
    """Variance over heads of attention [B, H, N]: [B, N], float32, at least 0."""
    values = exact(attention)
    # In two passes: a single one subtracts two large sums that are nearly equal.
    return (values - values.mean(dim=1, keepdim=True)).square().mean(dim=1).float()


def highest(values: Tensor, k: int) -> Tensor:
    """Raster indices [B, k], ascending, of each row's `k` highest values [B, N]; ties to the lower index.

    Not `torch.topk`: which of several equal values it takes is left to the device.
    """
    return values.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values


def take(features: Tensor, indices: Tensor) -> Tensor:
    """The tokens `indices` [B, K] of `features` [B, N, d]: [B, K, d]."""
    return features.gather(1, indices.unsqueeze(2).expand(-1, -1, features.shape[2]))


def directions(features: Tensor) -> Tensor:
    """`features` [B, N, d] at length 1, as `exact` computes; those of length zero stay zero."""
    return torch.nn.functional.normalize(exact(features), dim=2)


def cosines(points: Tensor, others: Tensor) -> Tensor:
    """Cosine of each of `points` [B, M, d] to each of `others` [B, S, d]: [B, M, S], float32.

    Rounded before, too: of a right angle a processor's product may leave 1e-17, which would not tie with 0.
    To a feature that is no number, as one that overflowed 16 bits, it is 1: nothing tells it from another.
    """
    ours = directions(points)
    theirs = ours if others is points else directions(others)
    return (ours @ theirs.transpose(1, 2)).round(decimals=12).float().nan_to_num_(nan=1.0)


def check_range(option: str, value: Any, low: float, high: float) -> None:
    """Raise `InvalidOptionError` unless `value` is a number from `low` to `high`, both included."""
    if not (is_number(value) and low <= value <= high):
        raise InvalidOptionError(f"{option} is a number from {low:g} to {high:g}.")


def check_choice(option: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise `InvalidOptionError` unless `value` is one of `choices`."""
    if value not in choices:
        raise InvalidOptionError(f"{option} is one of {', '.join(choices)}.")


def check_seed(seed: Any) -> None:
    """Raise `InvalidOptionError` unless `seed` is a whole number from 0 to 2**63 - 1."""
    if not (is_whole(seed) and 0 <= seed < 2**63):
        raise InvalidOptionError("seed is a whole number from 0 to 2**63 - 1.")
