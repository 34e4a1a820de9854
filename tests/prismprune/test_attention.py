"""Reading one block's CLS attention: the right numbers, and nothing computed for them in vain."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2Model
from transformers.models.clip import modeling_clip
from transformers.models.dinov2 import modeling_dinov2

from prismprune.attention import BlockReading, cls_attention, read_block
from prismprune.errors import InvalidScoresError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

GEOMETRY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
HEADS, SCALE = 4, 8**-0.5


class Tower:
    """A tiny random tower of either kind, its heads far from even, with the names of its parts."""

    def __init__(self, kind: str, implementation: str = "sdpa") -> None:
        torch.manual_seed(0)
        if kind == "clip":
            clip = CLIPVisionConfig(**GEOMETRY, intermediate_size=64)
            self.model = CLIPVisionModel._from_config(clip, attn_implementation=implementation)
            self.blocks, self.attention = self.model.encoder.layers, "self_attn"
        else:
            dino = Dinov2Config(**GEOMETRY)
            self.model = Dinov2Model._from_config(dino, attn_implementation=implementation)
            self.blocks, self.attention = self.model.encoder.layer, "attention"
        for parameter in self.model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.3)
        self.model.eval()

    def read(self, pixels: Tensor, block: int = 2) -> BlockReading:
        """The reading of a block; block 2 of 4 is what `vision_feature_layer = -2` uses."""
        module = self.blocks[block]
        with torch.inference_mode(), self.reader(module) as reading:
            self.model(pixels)
        return reading

    def reader(self, module: nn.Module) -> AbstractContextManager[BlockReading]:
        return read_block(module, getattr(module, self.attention), heads=HEADS, scale=SCALE)

    def hooks(self) -> list[object]:
        return [hook for module in self.model.modules() for hook in module._forward_hooks.values()]


@pytest.fixture(params=["clip", "dinov2"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def tower(kind: str) -> Tower:
    return Tower(kind)


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("block", [0, 2, 3])
def test_scores_are_the_cls_row_of_eager_attention(
    kind: str, tower: Tower, pixels: Tensor, block: int
) -> None:
    """Equal to what an eager tower returns as attention of that block, to 1e-5."""
    scores = tower.read(pixels, block).cls_attention()
    with torch.inference_mode():
        eager = Tower(kind, "eager").model(pixels, output_attentions=True).attentions[block]
    assert scores.shape == (3, HEADS, 16)
    assert eager.std() > 0.01  # heads that attend evenly would prove nothing
    torch.testing.assert_close(scores, eager[:, :, 0, 1:], atol=1e-5, rtol=0)


def test_features_are_the_hidden_state_of_transformers(tower: Tower, pixels: Tensor) -> None:
    """Bit for bit `hidden_states[-2]`, CLS included."""
    with torch.inference_mode():
        hidden_states = tower.model(pixels, output_hidden_states=True).hidden_states
    assert torch.equal(tower.read(pixels).hidden, hidden_states[-2])


def test_the_tower_never_runs_eager_attention(
    tower: Tower, pixels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither model's eager implementation is called, and its configuration still says SDPA."""

    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("eager attention ran")

    for module in (modeling_clip, modeling_dinov2):
        monkeypatch.setattr(module, "eager_attention_forward", forbidden)
    tower.read(pixels).cls_attention()
    assert tower.model.config._attn_implementation == "sdpa"


def test_later_blocks_do_not_run(tower: Tower, pixels: Tensor) -> None:
    """The tower stops after the block whose output is used."""
    ran = []
    for index, block in enumerate(tower.blocks):
        block.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
    tower.read(pixels, block=1)
    assert ran == [0, 1]


def test_hooks_come_off(tower: Tower, pixels: Tensor) -> None:
    """After a reading the tower is as it was."""
    before = tower.hooks()
    tower.read(pixels)
    assert tower.hooks() == before


def test_hooks_come_off_after_an_error(tower: Tower) -> None:
    """An error of the tower passes through and leaves nothing behind."""
    before = tower.hooks()
    with pytest.raises((ValueError, RuntimeError), match="channel"):
        tower.read(torch.zeros(1, 5, 32, 32))
    assert tower.hooks() == before


def test_the_tower_answers_in_full_afterwards(tower: Tower, pixels: Tensor) -> None:
    """Stopping it once does not shorten it."""
    with torch.inference_mode():
        before = tower.model(pixels).last_hidden_state
        tower.read(pixels)
        assert torch.equal(tower.model(pixels).last_hidden_state, before)


def test_other_threads_run_the_whole_tower(tower: Tower, pixels: Tensor) -> None:
    """A reading in this thread neither stops nor hears a call of the same tower in another one."""
    outputs = []

    def call() -> None:
        with torch.inference_mode():
            outputs.append(tower.model(pixels + 1).last_hidden_state)

    expected = tower.read(pixels)
    module = tower.blocks[2]
    with torch.inference_mode(), tower.reader(module) as reading:
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        tower.model(pixels)
    assert torch.equal(reading.hidden, expected.hidden)
    assert torch.equal(reading.cls_attention(), expected.cls_attention())
    assert torch.equal(outputs[0], tower.model(pixels + 1).last_hidden_state)


def test_readings_can_nest(tower: Tower, pixels: Tensor) -> None:
    """An inner reading ends its own call of the tower, and the outer one the next."""
    outer, inner = tower.blocks[3], tower.blocks[1]
    with torch.inference_mode(), tower.reader(outer) as later:
        with tower.reader(inner) as earlier:
            tower.model(pixels)
        tower.model(pixels)
    assert torch.equal(earlier.hidden, tower.read(pixels, 1).hidden)
    assert torch.equal(later.hidden, tower.read(pixels, 3).hidden)


def test_projections_without_weights_are_read(tower: Tower, pixels: Tensor) -> None:
    """Quantized layers have no plain weight to look at; they are called, and that is enough."""

    class Opaque(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.compute = linear.forward

        def forward(self, hidden: Tensor) -> Tensor:
            return self.compute(hidden)

    plain = tower.read(pixels).cls_attention()
    attention = getattr(tower.blocks[2], tower.attention)
    attention.q_proj, attention.k_proj = Opaque(attention.q_proj), Opaque(attention.k_proj)
    assert torch.equal(tower.read(pixels).cls_attention(), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_of_a_half_precision_tower_are_float32(
    tower: Tower, pixels: Tensor, dtype: torch.dtype
) -> None:
    """The softmax is in float32, so each head's row and CLS sum to one to float32's precision."""
    tower.model.to(dtype)
    reading = tower.read(pixels.to(dtype))
    scores = reading.cls_attention()
    assert (scores.dtype, reading.hidden.dtype) == (torch.float32, dtype)
    assert bool(((scores > 0) & (scores.sum(dim=2, keepdim=True) < 1)).all())


def test_scores_do_not_depend_on_the_batch() -> None:
    """An image's attention is the same, bit for bit, alone and in a batch."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(5, 16, 1, 64, generator=generator)
    keys = torch.randn(5, 577, 16, 64, generator=generator).transpose(1, 2)
    batched = cls_attention(queries, keys, 0.125)
    alone = [cls_attention(queries[i : i + 1], keys[i : i + 1], 0.125) for i in range(5)]
    assert torch.equal(batched, torch.cat(alone))


def test_a_tower_that_never_reaches_the_block_is_an_error(tower: Tower, pixels: Tensor) -> None:
    """A block of another tower is never run, and that is said."""
    stranger = Tower("clip").blocks[0]
    reader = read_block(stranger, stranger.self_attn, heads=HEADS, scale=SCALE)
    with pytest.raises(InvalidScoresError, match="without running the block"), torch.inference_mode(), reader:
        tower.model(pixels)
