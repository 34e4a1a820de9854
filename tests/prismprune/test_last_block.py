"""A tower's last block, computed for the patches that a method looks at and for no other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from prismprune import PrunedVLM, TokenBudget
from prismprune.encoding import EncodingRequest, encode
from prismprune.errors import InvalidScoresError
from prismprune.families import llava
from prismprune.last_block import can_stop_within, read_wanted
from prismprune.media import Picture
from prismprune.selection import METHODS, Scores, selector
from tests.prismprune.test_attention import HEADS, SCALE, Tower
from tests.prismprune.tiny import PATCHES, picture, save_tiny_llava, save_tiny_llava_next

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

KINDS = ("clip", "dinov2")
LOOKS_AT_FEW = {"prism", "saliency", "uniform", "random"}


def read(tower: Tower, pixels: Tensor, patches: Tensor | None) -> Any:
    with torch.inference_mode():
        return read_wanted(
            tower.model, tower.blocks[2], pixels, heads=HEADS, scale=SCALE, wanted=lambda _attention: patches
        )


@pytest.mark.parametrize("patches", [None, [], [0], [3, 1, 15], list(range(16))], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_wanted_is_what_the_whole_block_gives(kind: str, patches: list[int] | None) -> None:
    """And the attention, before and after; the rest is zeros."""
    tower, pixels = Tower(kind), torch.rand(1, 3, 32, 32)
    whole = tower.read(pixels)
    some = read(tower, pixels, None if patches is None else torch.tensor(patches, dtype=torch.long))
    rows = list(range(17)) if patches is None else [1 + each for each in patches]
    torch.testing.assert_close(some.hidden[:, rows], whole.hidden[:, rows], rtol=1e-4, atol=1e-5)
    others = [row for row in range(17) if row not in rows]
    assert not some.hidden[:, others].any()
    torch.testing.assert_close(some.cls_attention(), whole.cls_attention())
    torch.testing.assert_close(some.keys, whole.keys)


@pytest.mark.parametrize("kind", KINDS)
def test_no_more_is_computed(kind: str) -> None:
    """Keys and values of all tokens, all else of those that are wanted, and nothing behind the block."""
    tower, seen = Tower(kind), dict[str, int]()
    block = tower.blocks[2]
    for name in ("mlp", f"{tower.attention}.v_proj", f"{tower.attention}.q_proj"):
        block.get_submodule(name).register_forward_hook(
            lambda _module, inputs, _output, name=name: seen.update({name: inputs[0].shape[1]})
        )
    tower.blocks[3].register_forward_hook(lambda *_: seen.update(behind=1))
    read(tower, torch.rand(1, 3, 32, 32), torch.tensor([2, 4, 5]))
    assert seen == {"mlp": 3, f"{tower.attention}.v_proj": 17, f"{tower.attention}.q_proj": 3}


def test_the_hooks_come_off_also_where_the_block_never_runs() -> None:
    tower = Tower("clip")
    read(tower, torch.rand(1, 3, 32, 32), None)
    with torch.inference_mode(), pytest.raises(InvalidScoresError):
        read_wanted(
            nn.Identity(), tower.blocks[2], torch.rand(1), heads=HEADS, scale=SCALE, wanted=lambda _: None
        )
    assert not any(module._forward_pre_hooks for module in tower.model.modules())


def test_a_tower_that_gives_its_attention_is_left_alone() -> None:
    """And so are blocks that nobody knows."""
    tower = Tower("clip")
    assert can_stop_within(tower.model, tower.blocks[2])
    assert not can_stop_within(Tower("clip", "eager").model, tower.blocks[2])
    assert not can_stop_within(tower.model, nn.Identity())
    assert not can_stop_within(tower.model.train(), tower.blocks[2])


@given(
    method=st.sampled_from(sorted(LOOKS_AT_FEW)),
    images=st.integers(1, 3),
    patches=st.integers(1, 60),
    share=st.floats(0, 1),
    seed=st.integers(0, 9),
)
def test_a_method_looks_where_it_says(
    method: str, images: int, patches: int, share: float, seed: int
) -> None:
    """It chooses the same where all other features are no numbers, and keeps nothing else."""
    draw = torch.Generator().manual_seed(seed)
    attention = torch.rand(images, 4, patches, generator=draw)
    features = torch.rand(images, patches, 8, generator=draw)
    choose, keep = selector(method), round(share * patches)
    looked_at = choose.looks_at(attention, keep)
    assert looked_at is not None
    known = torch.zeros(images, patches, dtype=torch.bool).scatter(1, looked_at, True)
    some = torch.where(known[:, :, None], features, torch.nan)
    whole, chosen = (choose(Scores(attention, each), keep) for each in (features, some))
    assert torch.equal(chosen.indices, whole.indices)
    assert known.gather(1, chosen.indices).all()


def test_the_methods_that_say_so() -> None:
    """Others need every feature."""
    few = {name for name in METHODS if selector(name).looks_at_few}
    assert few == LOOKS_AT_FEW
    attention = torch.rand(1, 2, 9)
    assert all(selector(name).looks_at(attention, 3) is None for name in METHODS if name not in few)


@pytest.fixture(params=["clip", "dinov2", "next"])
def vlm(request: pytest.FixtureRequest, tmp_path: Path) -> PrunedVLM:
    if request.param == "next":
        return PrunedVLM.from_pretrained(save_tiny_llava_next(tmp_path / "tiny"), device="cpu")
    return PrunedVLM.from_pretrained(save_tiny_llava(tmp_path / "tiny", tower=request.param), device="cpu")


@pytest.fixture
def looked_at(vlm: PrunedVLM) -> Iterator[list[int]]:
    """Of each run of the last block: tokens that its MLP saw."""
    seen = list[int]()
    tower = vlm.model.model.vision_tower
    blocks = tower.encoder.layers if hasattr(tower.encoder, "layers") else tower.encoder.layer
    hook = blocks[-2].mlp.register_forward_hook(
        lambda _module, inputs, _output: seen.append(inputs[0].shape[1])
    )
    yield seen
    hook.remove()


def test_encodings_are_those_of_the_whole_tower(
    vlm: PrunedVLM, looked_at: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every method, in one batch with media that keep all."""
    few = TokenBudget(4)
    requests = [
        EncodingRequest((Picture(picture(number)),), TokenBudget.all() if number == 1 else few, method)
        for number, method in enumerate(METHODS)
    ]
    some = encode(vlm._family, requests)
    assert min(looked_at) < PATCHES < max(looked_at)
    looked_at.clear()
    monkeypatch.setattr(llava, "can_stop_within", lambda *_: False)
    whole = encode(vlm._family, requests)
    assert set(looked_at) == {1 + PATCHES}
    for own, wanted in zip(some, whole, strict=True):
        assert own.token_map == wanted.token_map
        for visual, other in zip(own.visuals, wanted.visuals, strict=True):
            torch.testing.assert_close(visual.features, other.features, rtol=1e-3, atol=1e-4)
