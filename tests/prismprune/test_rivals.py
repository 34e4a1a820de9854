"""The rival methods: each against a plain reading of its equations, one image and one token at a time.

The references share no code with the library. Like it, they compute in float64 and round to float32 before
they compare, so that values equal in exact arithmetic tie.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from prismprune import (
    METHODS,
    InvalidScoresError,
    Picture,
    PrunedVLM,
    Scores,
    Selection,
    TokenBudget,
    select,
    selector,
)
from prismprune.selection.base import cosines
from tests.present import present
from tests.prismprune.families import CHECKPOINTS, PICTURES
from tests.prismprune.test_selection import DTYPES, random_scores
from tests.prismprune.tiny import picture

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from prismprune.families.base import Family, Pixels

Array = NDArray[np.floating]
Reference = tuple[list[int], Array | None]
"""Kept raster indices, ascending, and each kept token's weights over all tokens."""


def most(values: Array, count: int) -> list[int]:
    """The `count` highest, highest first, ties to the lower index."""
    return sorted(range(len(values)), key=lambda i: (-np.float32(values[i]), i))[:count]


def cosine(one: Array, other: Array) -> float:
    lengths = max(float(np.linalg.norm(one)), 1e-12) * max(float(np.linalg.norm(other)), 1e-12)
    return float(np.float32(one @ other / lengths))


def visionzip(attention: Array, features: Array, keys: Array, projected: Array, k: int) -> Reference:
    tokens, contextual = attention.shape[1], k * 5 // 32
    key = keys.mean(axis=0)
    dominant = most(attention.mean(axis=0), k - contextual)
    weights = {i: np.eye(tokens)[i] for i in dominant}
    rest = [i for i in range(tokens) if i not in dominant]
    targets = [rest[place * (len(rest) // contextual)] for place in range(contextual)]
    comers: dict[int, list[int]] = {target: [] for target in targets}
    if contextual:
        for i in (i for i in rest if i not in targets):
            comers[min(targets, key=lambda t: (-cosine(key[i], key[t]), t))].append(i)
    for target, own in comers.items():
        weights[target] = np.eye(tokens)[target] + np.eye(tokens)[own].sum(axis=0) / max(len(own), 1)
    kept = sorted(weights)
    return kept, np.array([weights[i] for i in kept]) if contextual else None


def vispruner(attention: Array, features: Array, keys: Array, projected: Array, k: int) -> Reference:
    order = most(attention.mean(axis=0), attention.shape[1])
    salient, rest, wanted = order[: k // 2], order[k // 2 :], k - k // 2
    while len(rest) > wanted > 0:
        even, odd = rest[::2], rest[1::2]
        likeness = np.array([max(cosine(features[i], features[j]) for j in odd) for i in even])
        gone = min(8, len(rest) - wanted, len(even))
        rest = [even[place] for place in most(likeness, len(even))[gone:]] + odd
    return sorted(salient + rest[:wanted]), None


def divprune(attention: Array, features: Array, keys: Array, projected: Array, k: int) -> Reference:
    tokens = range(len(projected))
    far = {(i, j): np.float32(1) - cosine(projected[i], projected[j]) for i in tokens for j in tokens}
    picked: list[int] = []
    while len(picked) < k:
        others = picked or list(tokens)
        gain = {i: min((far[i, j] for j in others if j != i), default=0) for i in tokens if i not in picked}
        picked.append(min(gain, key=lambda i: (-gain[i], i)))
    return sorted(picked), None


def prumerge_plus(attention: Array, features: Array, keys: Array, projected: Array, k: int) -> Reference:
    mean = attention.mean(axis=0).astype(np.float32)
    low, high = np.quantile(mean.astype(np.float64), [0.25, 0.75])
    kept = [i for i in most(mean, k) if mean[i] > high + 1.5 * (high - low)]
    free = [i for i in range(len(mean)) if i not in kept]
    missing = k - len(kept)
    kept = sorted(kept + [free[(2 * step + 1) * len(free) // (2 * missing)] for step in range(missing)])
    key = keys.transpose(1, 0, 2).reshape(len(mean), -1)
    weights = np.eye(len(mean))[kept]
    for row, i in enumerate(kept):
        others = [j for j in range(len(mean)) if j != i]
        for j in sorted(others, key=lambda j: (-cosine(key[i], key[j]), j))[:32]:
            weights[row, j] = mean[j]
    return kept, weights


def promprune(attention: Array, features: Array, keys: Array, projected: Array, k: int) -> Reference:
    points = projected / np.maximum(np.linalg.norm(projected, axis=1, keepdims=True), 1e-12)
    values = np.linalg.svd(points - points.mean(axis=0), compute_uv=False) ** 2
    shares = np.maximum(values, 1e-12) / np.maximum(values, 1e-12).sum()
    entropy = -(shares * np.log(shares)).sum() / np.log(max(len(shares), 2))
    salient = most(attention.mean(axis=0), round(float(k / (1 + np.exp((entropy - 0.42) / 0.02)))))
    picked: list[int] = []
    while len(salient) + len(picked) < k:
        free = [i for i in range(len(points)) if i not in salient + picked]
        if picked:
            gain = {i: unexplained(points[i], points[picked]) for i in free}
        else:
            gain = {i: -max((cosine(points[i], points[j]) for j in salient), default=0) for i in free}
        picked.append(min(free, key=lambda i: (-gain[i], i)))
    return sorted(salient + picked), None


def unexplained(point: Array, picked: Array) -> float:
    """What is left of a point once the span of the picked ones is taken out, squared: det(L + i) / det(L)."""
    left = point - picked.T @ np.linalg.lstsq(picked.T, point, rcond=None)[0]
    return float(np.float32(left @ left))


REFERENCES: dict[str, Callable[..., Reference]] = {
    "visionzip": visionzip,
    "vispruner": vispruner,
    "divprune": divprune,
    "prumerge_plus": prumerge_plus,
    "promprune": promprune,
}
MERGING = ("visionzip", "prumerge_plus")


def whole_scores(
    images: int, tokens: int, width: int = 40, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    attention, features = random_scores(images, 4, tokens, 8, seed=seed, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(images, 4, tokens, 5, generator=generator)
    projected = torch.randn(images, tokens, width, generator=generator)
    return {
        "attention": attention,
        "features": features,
        "keys": keys.to(dtype),
        "projected": projected.to(dtype),
    }


def check(method: str, scores: dict[str, Tensor], k: int) -> None:
    """Hold a batch against the reference of each image."""
    found = select(scores["attention"], scores["features"], k, method, **rest(scores))
    for image in range(len(scores["features"])):
        one = {name: values[image].double().numpy() for name, values in scores.items()}
        kept, weights = REFERENCES[method](**one, k=k)
        assert found.indices[image].tolist() == kept
        assert (weights is None) == (found.weights is None)
        if weights is not None:
            torch.testing.assert_close(present(found.weights)[image], torch.from_numpy(weights).float())


def as_scores(whole: dict[str, Tensor]) -> Scores:
    return Scores(whole["attention"], whole["features"], keys=whole["keys"], projected=whole["projected"])


def rest(scores: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: scores[name] for name in ("keys", "projected")}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", REFERENCES)
@pytest.mark.parametrize("k", [32, 9, 1])
def test_a_rival_is_what_its_equations_say(method: str, dtype: torch.dtype, k: int) -> None:
    """Same tokens and the same weights as the plain reading, whatever the dtype of the input."""
    check(method, whole_scores(2, 70, seed=k, dtype=dtype), k)


@settings(max_examples=40)
@given(
    method=st.sampled_from(tuple(REFERENCES)),
    tokens=st.integers(2, 40),
    share=st.floats(0, 1),
    seed=st.integers(0, 999),
)
def test_a_rival_is_what_its_equations_say_at_any_size(
    method: str, tokens: int, share: float, seed: int
) -> None:
    """From one token to all of them."""
    check(method, whole_scores(2, tokens, seed=seed), max(1, round(share * tokens)))


@settings(max_examples=60)
@given(
    method=st.sampled_from(("visionzip", "vispruner", "divprune", "prumerge_plus")),
    tokens=st.integers(2, 24),
    k=st.integers(1, 24),
    seed=st.integers(0, 999),
)
def test_ties_go_to_the_lower_raster_index(method: str, tokens: int, k: int, seed: int) -> None:
    """Small whole numbers as scores: equal attention, equal cosines, copies of tokens."""
    rng = np.random.default_rng(seed)
    whole = {
        "attention": rng.integers(0, 4, (2, 2, tokens)) / 256,
        "features": rng.integers(-1, 2, (2, tokens, 2)),
        "keys": rng.integers(-1, 2, (2, 2, tokens, 2)),
        "projected": rng.integers(-1, 2, (2, tokens, 2)),
    }
    check(method, {name: torch.from_numpy(values).float() for name, values in whole.items()}, min(k, tokens))


@pytest.mark.parametrize("tokens", [2, 9, 24, 65])
def test_right_angles_tie(tokens: int) -> None:
    """Whatever a processor's product leaves of them."""
    points = torch.tensor([[1.0, 1.0], [1.0, -1.0]]).repeat(tokens, 1)[None]
    assert set(cosines(points, points).flatten().tolist()) == {0.0, 1.0}


@settings(max_examples=60)
@given(
    method=st.sampled_from(METHODS),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 40)),
    k=st.integers(0, 45),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 999),
)
def test_every_method_keeps_k_in_order_whatever_the_batch(
    method: str, sizes: tuple[int, int], k: int, dtype: torch.dtype, seed: int
) -> None:
    """min(k, N) distinct ascending indices, the same again, and the same for an image by itself."""
    images, tokens = sizes
    whole = whole_scores(images, tokens, seed=seed, dtype=dtype)
    choose = selector(method)
    found = choose(as_scores(whole), k)
    again = choose(as_scores(whole), k)
    assert found.indices.shape == (images, min(k, tokens))
    assert torch.equal(found.indices, again.indices)
    for image in range(images):
        alone = choose(as_scores({name: values[image : image + 1] for name, values in whole.items()}), k)
        row = found.indices[image].tolist()
        assert row == alone.indices[0].tolist() == sorted(set(row))
        assert set(row) <= set(range(tokens))


@pytest.mark.parametrize("method", MERGING)
def test_a_merging_method_weighs_every_kept_token_itself_by_one(method: str) -> None:
    """What is merged is added: a kept token is still in its own sum, whole."""
    scores = whole_scores(2, 60)
    found = select(scores["attention"], scores["features"], 20, method, **rest(scores))
    weights = present(found.weights)
    assert weights.shape == (2, 20, 60)
    own = weights.gather(2, found.indices.unsqueeze(2))
    assert torch.equal(own, torch.ones_like(own))


def test_merged_tokens_are_the_weighted_features() -> None:
    """`Selection.tokens` is weights @ features in float32, in the dtype of the features."""
    features = torch.tensor([[[1.0, 0.0], [3.0, 4.0], [5.0, 2.0]]], dtype=torch.bfloat16)
    weights = torch.tensor([[[1.0, 0.5, 0.0], [0.0, 0.0, 1.0]]])
    selection = Selection(torch.tensor([[0, 2]]), weights=weights)
    assert selection.tokens(features).dtype == torch.bfloat16
    assert selection.tokens(features).tolist() == [[[2.5, 2.0], [5.0, 2.0]]]


def test_visionzip_splits_the_budget_as_its_authors_do() -> None:
    """30 contextual tokens of 192, 20 of 128, 10 of 64: those whose weights name other tokens."""
    scores = whole_scores(1, 576)
    for k, contextual in ((192, 30), (128, 20), (64, 10)):
        found = select(scores["attention"], scores["features"], k, "visionzip", **rest(scores))
        weights = present(found.weights)
        assert int((weights.sum(dim=2) > 1.5).sum()) <= contextual
        assert int((weights.count_nonzero(dim=2) > 1).sum()) > 0
        assert int(weights.count_nonzero()) == 576  # nothing is lost: each token is in exactly one sum


def test_prumerge_plus_keeps_outliers_first_and_spreads_the_rest() -> None:
    """Two tokens stick out; the four others stand in the middles of four equal stretches of what is left."""
    attention = torch.full((1, 1, 14), 0.01)
    attention[0, 0, [3, 9]] = 0.3
    scores = {"attention": attention, "features": torch.randn(1, 14, 4)}
    found = select(**scores, budget=6, method="prumerge_plus", keys=torch.randn(1, 1, 14, 4))
    assert found.indices.tolist() == [[1, 3, 5, 8, 9, 12]]


@pytest.mark.parametrize("decay", [0.6, 0.66, 0.7, 0.75])
def test_promprune_mixes_its_halves_as_its_equations_say(decay: float) -> None:
    """Features whose directions fade have an entropy at which each picture has a split of its own."""
    scores = whole_scores(6, 70)
    scores["projected"] *= decay ** torch.arange(40)
    check("promprune", scores, 12)


@pytest.mark.parametrize(("spread", "salient"), [(False, True), (True, False)])
def test_promprune_splits_by_the_entropy_of_the_features(spread: bool, salient: bool) -> None:
    """Features along one line: only attended tokens; features in all directions: only diverse ones."""
    generator = torch.Generator().manual_seed(0)
    attention = torch.rand(1, 2, 48, generator=generator)
    line = torch.randn(1, 48, 1, generator=generator) * torch.ones(64) + torch.eye(64)[0]
    projected = torch.randn(1, 48, 64, generator=generator) if spread else line
    found = select(attention, projected, 8, "promprune").indices
    attended = select(attention, projected, 8, "saliency").indices
    assert torch.equal(found, attended) == salient


@pytest.mark.parametrize("method", ["divprune", "promprune"])
def test_features_stand_for_embeddings_that_are_not_given(method: str) -> None:
    """The bare function works on attention and features alone."""
    scores = whole_scores(2, 30)
    bare = select(scores["attention"], scores["features"], 7, method)
    named = select(scores["attention"], scores["features"], 7, method, projected=scores["features"])
    assert torch.equal(bare.indices, named.indices)


@pytest.mark.parametrize("method", METHODS)
def test_features_may_require_a_gradient(method: str) -> None:
    """As they do where a projector is trained behind the selection: the tokens are the same."""
    scores = whole_scores(2, 30)
    plain = selector(method)(as_scores(scores), 9)
    traced = selector(method)(as_scores({name: one.requires_grad_() for name, one in scores.items()}), 9)
    assert torch.equal(plain.indices, traced.indices)


@pytest.mark.parametrize("method", MERGING)
def test_keys_that_are_missing_are_asked_for(method: str) -> None:
    """Nothing can stand for keys: the error names the method and what it lacks."""
    scores = whole_scores(1, 12)
    with pytest.raises(InvalidScoresError, match=f"{method} needs the keys"):
        select(scores["attention"], scores["features"], 8, method)


@pytest.mark.parametrize(
    "wrong", [{"keys": (2, 4, 8, 5)}, {"keys": (2, 4, 9)}, {"projected": (2, 8, 3)}, {"projected": (9, 3)}]
)
def test_keys_and_embeddings_of_other_patches_are_refused(wrong: dict[str, Any]) -> None:
    """They are of the same images, heads and patches."""
    given_too: dict[str, Any] = {name: torch.zeros(shape) for name, shape in wrong.items()}
    with pytest.raises(InvalidScoresError):
        Scores(torch.zeros(2, 4, 9), torch.zeros(2, 9, 3), **given_too)


@pytest.fixture(scope="module")
def models(checkpoints: Callable[[str], Path]) -> dict[str, PrunedVLM]:
    return {name: PrunedVLM.from_pretrained(checkpoints(name)) for name in CHECKPOINTS}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_method_keeps_in_every_family_what_it_keeps_of_a_view_alone(
    models: dict[str, PrunedVLM], name: str, method: str
) -> None:
    """Two pictures of one request: each crop's or picture's tokens, from its own candidates' scores."""
    vlm, media = models[name], PICTURES["two"]
    family = vlm._family
    parts = vlm.encode(media, 40, method=method).token_map
    views = sorted(
        (view for group in family.preprocess(family.views(media)) for view in alone(family, group)),
        key=lambda view: view[0],
    )
    shares = TokenBudget(tokens=40).split([len(seen) for _, seen, _ in views])
    for (place, seen, scores), share in zip(views, shares, strict=True):
        assert parts[place].kept == tuple(seen[selector(method)(scores, share).indices[0]].tolist())


def alone(family: Family, group: Pixels) -> Iterator[tuple[int, Tensor, Scores]]:
    """Place, raster indices of the candidates and their scores, of one view after the other."""
    reading = family.read(group)
    for row, place in enumerate(group.places):
        seen = group.region(row).raster(group.grid)
        features = reading.patches[row, seen][None]
        attention, keys = reading.attention()[row][None, :, seen], reading.keys()[row][None, :, seen]
        yield place, seen, Scores(attention, features, keys=keys, projected=family.project(features))


@pytest.mark.parametrize("method", MERGING)
def test_what_a_family_projects_are_the_merged_tokens(models: dict[str, PrunedVLM], method: str) -> None:
    """The features that reach the language model are the projection of weights @ features."""
    family = models["llava"]._family
    media = [Picture(picture(3))]
    (pixels,) = family.preprocess(family.views(media))
    reading = family.read(pixels)
    found = select(reading.attention(), reading.patches, 8, method, keys=reading.keys())
    encoded = models["llava"].encode(media, 8, method=method)
    torch.testing.assert_close(encoded.visuals[0].features, family.project(found.tokens(reading.patches))[0])


@pytest.mark.parametrize("method", METHODS)
def test_an_answer_says_which_method_it_is_from(models: dict[str, PrunedVLM], method: str) -> None:
    """A comparison changes one word: so many tokens are kept, reported and seen by the language model."""
    ask = partial(models["llava"].answer, [picture(0), picture(1)], "?", max_new_tokens=2)
    pruned, everything = ask(token_budget=9, method=method), ask()
    assert (pruned.visual_tokens.kept, pruned.visual_tokens.method) == (9, method)
    assert everything.prompt_tokens - pruned.prompt_tokens == 2 * 16 - 9
