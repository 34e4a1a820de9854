"""Selection: the library against the reference, and what holds for every method."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prismprune import (
    METHODS,
    InvalidBudgetError,
    InvalidOptionError,
    InvalidScoresError,
    Scores,
    Selection,
    TokenBudget,
    UnknownMethodError,
    select,
    selector,
)
from prismprune.selection.fps import FPS_STARTS, FpsStart, farthest_points, one_kernel, step_by_step
from tests.present import present
from tests.prismprune import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_scores(
    images: int = 3,
    heads: int = 4,
    tokens: int = 50,
    width: int = 8,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Attention as a softmax leaves it, [B, H, N], and features [B, N, d]."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(images, heads, tokens + 1, generator=generator)
    features = torch.randn(images, tokens, width, generator=generator)
    return logits.softmax(dim=-1)[:, :, 1:].to(dtype), features.to(dtype)


def expected(
    attention: Tensor, features: Tensor, k: int, **options: Any
) -> list[tuple[list[int], list[int]]]:
    """The reference's (salient, diverse) of each image."""
    pairs = zip(attention.double().numpy(), features.double().numpy(), strict=True)
    return [reference.prism(a, f, k, **options) for a, f in pairs]


def kept_parts(selection: Selection) -> list[tuple[list[int], list[int]]]:
    """A batched selection as the reference writes it."""
    salient, diverse = sides(selection)
    return list(zip(salient.tolist(), diverse.tolist(), strict=True))


def sides(selection: Selection) -> tuple[Tensor, Tensor]:
    """The salient and the diverse tokens, of a method that tells them apart."""
    return present(selection.salient), present(selection.diverse)


def chosen(attention: Tensor, features: Tensor, k: int, method: str, **options: Any) -> Selection:
    """`select` with keys that follow from the rest, for methods that need some."""
    keys = attention.unsqueeze(-1) + features.unsqueeze(-3)
    return select(attention, features, k, method, keys=keys, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_prism_matches_the_reference_on_200_maps(dtype: torch.dtype) -> None:
    """Same salient and the same diverse tokens, in LLaVA-1.5's geometry, whatever the dtype of the input."""
    for seed, k in enumerate((128, 64, 32, 192, 33)):
        attention, features = random_scores(40, 16, 576, 64, seed=seed, dtype=dtype)
        selection = select(attention, features, k)
        assert kept_parts(selection) == expected(attention, features, k)


@st.composite
def tied_scores(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Small integers as attention and features: ties everywhere, and every sum exact in binary."""
    images, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 24))
    heads, width = draw(st.sampled_from([1, 2, 4, 8])), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    attention = rng.integers(0, draw(st.integers(1, 9)), (images, heads, tokens)) / 256
    features = rng.integers(-1, 2, (images, tokens, width))
    return torch.from_numpy(attention).float(), torch.from_numpy(features).float()


@settings(max_examples=300)
@given(
    scores=tied_scores(),
    k=st.integers(1, 30),
    share=st.sampled_from([0, 0.25, 0.29, 0.5, 0.75, 1]),
    factor=st.sampled_from([1, 1.5, 4, 64, None]),
    start=st.sampled_from(FPS_STARTS),
)
def test_prism_matches_the_reference_with_ties_and_options(
    scores: tuple[Tensor, Tensor], k: int, share: float, factor: float | None, start: FpsStart
) -> None:
    """Ties break to the lower raster index, in each step and under every option."""
    options: dict[str, Any] = {"salient_share": share, "pool_factor": factor, "fps_start": start}
    selection = select(*scores, k, **options)
    assert kept_parts(selection) == expected(*scores, k, share=share, factor=factor, start=start)


@settings(max_examples=100)
@given(st.integers(1, 20), st.integers(1, 40), st.integers(1, 45), st.integers(0, 999))
def test_copies_of_a_token_tie(heads: int, tokens: int, k: int, seed: int) -> None:
    """Tokens with the same attention and features tie exactly, also where sums round; the first ones win."""
    attention, features = random_scores(2, heads, tokens, 5, seed=seed)
    copies = torch.randint(tokens, (tokens,), generator=torch.Generator().manual_seed(seed))
    attention, features = attention[:, :, copies], features[:, copies]
    assert kept_parts(select(attention, features, k)) == expected(attention, features, k)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("k", [0, 1, 2, 17, 49, 50, 51, 10**6])
def test_every_method_keeps_exactly_k(method: str, k: int) -> None:
    """min(K, N) distinct raster indices in ascending order, as int64."""
    attention, features = random_scores()
    keys = features.unsqueeze(1).expand(-1, 4, -1, -1)
    indices = selector(method)(Scores(attention, features, keys=keys), k).indices
    assert indices.shape == (3, min(k, 50))
    assert indices.dtype == torch.int64
    assert all(row == sorted(set(row)) and set(row) <= set(range(50)) for row in indices.tolist())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("k", [1, 16, 50])
def test_every_method_is_blind_to_the_batch(method: str, k: int) -> None:
    """Each image of a batch gets what it gets alone."""
    attention, features = random_scores(images=5, tokens=50, width=33)
    batched = chosen(attention, features, k, method)
    for image in range(5):
        alone, member = chosen(attention[image], features[image], k, method), batched.image(image)
        for part in ("indices", "salient", "diverse", "weights"):
            mine, theirs = getattr(alone, part), getattr(member, part)
            assert (mine is None and theirs is None) or torch.equal(mine, theirs)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_repeats_itself(method: str) -> None:
    """Same input, same tokens."""
    scores = random_scores()
    assert torch.equal(chosen(*scores, 20, method).indices, chosen(*scores, 20, method).indices)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_degenerate_input(method: str) -> None:
    """Attention without differences and features of length zero still give K distinct tokens."""
    indices = chosen(torch.zeros(2, 3, 12), torch.zeros(2, 12, 4), 5, method).indices
    assert [len(set(row)) for row in indices.tolist()] == [5, 5]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_none_of_no_patches(method: str) -> None:
    """As of a view that is all padding."""
    keys = torch.zeros(2, 3, 0, 4)
    selection = selector(method)(Scores(torch.zeros(2, 3, 0), torch.zeros(2, 0, 4), keys=keys), 0)
    assert selection.indices.shape == (2, 0)
    assert selection.tokens(torch.zeros(2, 0, 4)).shape == (2, 0, 4)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_features_that_are_no_numbers(method: str, value: float) -> None:
    """16 bits overflow: there are K distinct tokens, and the neighbor in the batch keeps its own."""
    attention, features = random_scores(images=2, tokens=20)
    keys = torch.randn(2, 4, 20, 8, generator=torch.Generator().manual_seed(1))
    expected = select(attention, features, 7, method, keys=keys).indices[1]
    features[0, 3, 2] = value
    indices = select(attention, features, 7, method, keys=keys).indices
    assert len(set(indices[0].tolist())) == 7
    assert torch.equal(indices[1], expected)


@pytest.mark.parametrize("seed", range(4))
def test_promprune_keeps_what_is_no_number_last(seed: int) -> None:
    """Beside a salient set, a token like none of it would be the first of the diverse ones."""
    generator = torch.Generator().manual_seed(seed)
    # Three directions and some noise: a balance between the two parts.
    features = torch.randn(20, 3, generator=generator) @ torch.randn(3, 32, generator=generator)
    features += 0.1 * torch.randn(20, 32, generator=generator)
    attention = torch.rand(4, 20, generator=generator)
    attention[:, 3], features[3] = 0, torch.nan
    assert 3 not in select(attention, features, 10, "promprune").indices


@pytest.mark.parametrize("start", FPS_STARTS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_features_that_are_no_numbers_give_no_duplicates(start: FpsStart, value: float) -> None:
    """16 bits overflow: such a token is like every other, and the rest are told apart as ever."""
    features = torch.eye(12)[None].repeat(2, 1, 1)
    features[0, 3] = value
    variance = torch.arange(12.0).expand(2, -1)
    for salient in (None, features[:, 2:5]):
        kept = farthest_points(features, 6, variance=variance, start=start, salient=salient)
        assert [len(set(row)) for row in kept.tolist()] == [6, 6]
        assert start != "max_variance" or 3 not in kept[0]


@pytest.mark.parametrize("k", [0, 1, 7, 50, 60])
def test_salient_and_diverse_part_the_kept_tokens(k: int) -> None:
    """K_sal is K // 2 and K_div the rest, also where all are kept."""
    selection = selector("prism")(Scores(*random_scores()), k)
    salient, diverse = sides(selection)
    assert torch.equal(torch.cat([salient, diverse], dim=1).sort(dim=1).values, selection.indices)
    assert salient.shape[1] == min(k, 50) // 2


@pytest.mark.parametrize(("method", "parts"), [("saliency", (9, 0)), ("fps", (0, 9)), ("divprune", (0, 9))])
def test_one_sided_methods_say_which_side(method: str, parts: tuple[int, int]) -> None:
    """`saliency` keeps salient tokens only, `fps` and `divprune` diverse ones only."""
    salient, diverse = sides(select(*random_scores(), 9, method))
    assert (salient.shape[1], diverse.shape[1]) == parts


@pytest.mark.parametrize("method", ["uniform", "random", "visionzip", "prumerge_plus", "promprune"])
def test_methods_without_sides_say_so(method: str) -> None:
    """They do not part what they keep in salient and diverse tokens."""
    selection = chosen(*random_scores(), 9, method)
    assert selection.salient is None
    assert selection.diverse is None


def test_saliency_is_prism_without_diversity() -> None:
    """K_div = 0 is saliency only."""
    scores = random_scores()
    assert torch.equal(select(*scores, 20, "saliency").indices, select(*scores, 20, salient_share=1).indices)


@pytest.mark.parametrize("start", FPS_STARTS)
def test_fps_is_prism_without_salience_and_filter(start: FpsStart) -> None:
    """K_sal = 0 and M = all is global FPS."""
    scores = random_scores()
    prism = select(*scores, 20, salient_share=0, pool_factor="all", fps_start=start)
    assert torch.equal(select(*scores, 20, "fps", fps_start=start).indices, prism.indices)


def test_uniform_is_evenly_spaced() -> None:
    """The middle of each of K equal stretches of the raster."""
    assert select(*random_scores(1, 2, 12), 4, "uniform").indices.tolist() == [[1, 4, 7, 10]]


def test_random_depends_on_seed_and_size_alone() -> None:
    """The same seed draws the same tokens for other images; another seed draws others."""
    first, second = random_scores(seed=1), random_scores(images=1, heads=2, seed=2)
    assert torch.equal(select(*first, 20, "random").indices[:1], select(*second, 20, "random").indices)
    assert not torch.equal(select(*first, 20, "random").indices, select(*first, 20, "random", seed=1).indices)


def test_a_smaller_random_budget_is_part_of_a_larger() -> None:
    """One permutation a seed, so budgets nest and comparisons between them are fair."""
    scores = random_scores()
    small, large = (set(select(*scores, k, "random").indices[0].tolist()) for k in (10, 30))
    assert small < large


def test_attention_in_half_precision_keeps_variances_apart() -> None:
    """The variance is not computed in float16, where small attention underflows to zero variance."""
    attention = torch.tensor([[1e-3, 2e-3, 1e-3], [1e-3, 1e-3, 3e-3]], dtype=torch.float16)
    assert select(attention, torch.eye(3).half(), 1, "fps").indices.tolist() == [2]


@pytest.mark.parametrize("budget", [4, "4", TokenBudget(tokens=4), TokenBudget(ratio=1 / 3)])
def test_select_takes_any_budget(budget: Any) -> None:
    """A number, digits, a budget of tokens or a ratio of each image's candidates."""
    assert select(*random_scores(2, 2, 12), budget).indices.shape == (2, 4)


def test_select_of_one_image_has_no_batch() -> None:
    """[H, N] and [N, d] give [K]."""
    attention, features = random_scores(1)
    selection = select(attention[0], features[0], 10)
    assert [part.shape for part in (selection.indices, *sides(selection))] == [(10,), (5,), (5,)]


@pytest.mark.parametrize("method", METHODS)
def test_the_tokens_of_one_image_are_its_part_of_a_batch(method: str) -> None:
    """Indices [K] take [N, d] to [K, d], whether the method merges or not."""
    attention, features = random_scores()
    together = chosen(attention, features, 10, method).tokens(features)
    alone = chosen(attention[1], features[1], 10, method).tokens(features[1])
    assert alone.shape == (10, features.shape[2])
    torch.testing.assert_close(alone, together[1])


@pytest.mark.parametrize("budget", [0, -1, "many"])
def test_select_refuses_a_bad_budget(budget: Any) -> None:
    """The errors of `TokenBudget` come through."""
    with pytest.raises(InvalidBudgetError):
        select(*random_scores(), budget)


def test_an_unknown_method_is_told_the_known_ones() -> None:
    """The message lists every method."""
    with pytest.raises(UnknownMethodError, match=", ".join(METHODS)):
        selector("best")


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("prism", {"salient_share": -0.1}),
        ("prism", {"salient_share": 1.1}),
        ("prism", {"salient_share": float("nan")}),
        ("prism", {"salient_share": "half"}),
        ("prism", {"salient_share": True}),
        ("prism", {"salient_share": np.bool_(1)}),
        ("prism", {"pool_factor": 0.5}),
        ("prism", {"pool_factor": 65}),
        ("prism", {"pool_factor": "most"}),
        ("prism", {"fps_start": "first"}),
        ("prism", {"seed": 1}),
        ("fps", {"fps_start": "first"}),
        ("random", {"seed": -1}),
        ("random", {"seed": 2**63}),
        ("random", {"seed": 0.5}),
        ("uniform", {"seed": 1}),
    ],
)
def test_bad_options_are_refused(method: str, options: dict[str, Any]) -> None:
    """An option out of range, of the wrong type, or of another method."""
    with pytest.raises(InvalidOptionError):
        selector(method, **options)


@pytest.mark.parametrize(
    ("method", "options", "plain"),
    [
        ("prism", {"salient_share": np.float32(0.25)}, {"salient_share": 0.25}),
        ("prism", {"pool_factor": np.int64(3)}, {"pool_factor": 3}),
        ("random", {"seed": np.int64(7)}, {"seed": 7}),
    ],
)
def test_numpys_numbers_are_options_like_others(
    method: str, options: dict[str, Any], plain: dict[str, Any]
) -> None:
    """Those that a budget may be, an option may be."""
    scores = random_scores()
    assert torch.equal(
        select(*scores, 10, method, **options).indices, select(*scores, 10, method, **plain).indices
    )


@pytest.mark.parametrize(
    ("attention", "features", "grid"),
    [
        ((4, 9), (9, 2), None),
        ((1, 4, 9), (9, 2), None),
        ((1, 4, 9), (1, 8, 2), None),
        ((2, 4, 9), (1, 9, 2), None),
        ((1, 0, 9), (1, 9, 2), None),
        ((1, 4, 9), (1, 9, 2), (3, 4)),
    ],
)
def test_scores_that_do_not_belong_together_are_refused(
    attention: tuple[int, ...], features: tuple[int, ...], grid: tuple[int, int] | None
) -> None:
    """Attention and features are of the same images and patches, and the grid holds them."""
    with pytest.raises(InvalidScoresError):
        Scores(torch.zeros(attention), torch.zeros(features), grid)


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_selects_what_the_cpu_selects(method: str, dtype: torch.dtype) -> None:
    """Same input, same tokens on every device, ties included."""
    attention, features = random_scores(8, 16, 576, 256, dtype=dtype)
    features[:, 100:200] = features[:, 200:300]
    on_cpu = chosen(attention, features, 64, method)
    on_cuda = chosen(attention.cuda(), features.cuda(), 64, method)
    assert torch.equal(on_cpu.indices, on_cuda.indices.cpu())


KERNEL = """
import torch
from prismprune.selection.fps import step_by_step
from prismprune.selection.fps_kernel import spread
torch.manual_seed(0)
for images, size, k in ((1, 2, 1), (3, 40, 10), (5, 128, 32), (2, 300, 299)):
    points = torch.randn(images, size, 6)
    points[:, size // 2:] = points[:, :size - size // 2].clone()  # every distance comes twice
    distance = torch.cdist(points, points).masked_fill(torch.eye(size, dtype=torch.bool), -torch.inf)
    first = torch.randint(size, (images,))
    assert torch.equal(spread(distance, first, k), step_by_step(distance, first, k)), (images, size, k)
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="this torch was built without Triton")
def test_the_kernel_picks_what_the_steps_pick() -> None:
    """By Triton's interpreter, which needs no GPU; ties included."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", KERNEL], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_without_a_kernel_the_steps_are_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No Triton, no compiler, no GPU: told once, and nothing fails."""
    monkeypatch.setitem(sys.modules, "prismprune.selection.fps_kernel", None)
    one_kernel.cache_clear()
    try:
        assert one_kernel() is one_kernel() is None
    finally:
        one_kernel.cache_clear()
    (record,) = caplog.records
    assert "one by one" in record.message


@pytest.mark.gpu
@pytest.mark.parametrize(("images", "size", "k"), [(1, 5, 4), (5, 128, 32), (8, 576, 64), (1, 4096, 700)])
def test_the_kernel_on_the_device_picks_what_the_steps_pick(images: int, size: int, k: int) -> None:
    """Compiled, for each number of tokens that is compiled by itself."""
    _, features = random_scores(images, 1, size, 16)
    features[:, size // 2] = features[:, 0]
    distance = (1 - features @ features.transpose(1, 2)).cuda()
    distance.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    first = torch.arange(images, device="cuda") % size
    spread = one_kernel()
    assert spread is not None
    assert torch.equal(spread(distance, first, k), step_by_step(distance, first, k))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="a single GPU")
def test_the_kernel_runs_where_its_tensors_are() -> None:
    """Not on the current device."""
    attention, features = random_scores(2, 4, 64, 16)
    on_second = select(attention.to("cuda:1"), features.to("cuda:1"), 16)
    assert torch.equal(on_second.indices.cpu(), select(attention, features, 16).indices)


@pytest.mark.gpu
@pytest.mark.parametrize("start", FPS_STARTS)
def test_farthest_point_sampling_never_waits_for_the_device(start: FpsStart) -> None:
    """Torch raises where a step would, on a clip's frames at once."""
    attention, features = random_scores(8, 16, 576, 64)
    features, variance = features.cuda(), attention.cuda().var(dim=1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        farthest_points(features, 32, variance=variance, start=start, salient=features[:, :8])
    finally:
        torch.cuda.set_sync_debug_mode("default")
