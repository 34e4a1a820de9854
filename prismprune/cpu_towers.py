"""Blocks of vision towers as a CPU computes them best: attention, and MLPs whose activation costs no pass.

Between an MLP's two products the patches take four times their room, more than fits into the caches near a
core, and each pass over them is a good part of what a product takes. oneDNN computes an activation as it
writes a product. Of CLIP's, `x * sigmoid(1.702 * x)`, it has only the kind without a factor, so that the
copies of both weights have it: the first is multiplied by it, and the second divided.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.activations import GELUActivation, QuickGELUActivation

from prismprune.cpu_attention import looked_at_all
from prismprune.cpu_changes import Changed, Untouched, changed_class
from prismprune.cpu_products import Copies, CpuLinear

if TYPE_CHECKING:
    from torch import Tensor, nn

ATTENTION = {"CLIPAttention", "Dinov2Attention"}
"""Transformers' modules, by their names, that may be a `_Attention`."""
MLPS = {"CLIPMLP", "Dinov2MLP"}
"""Transformers' modules, by their names, that may be a `_MLP`."""
QUICK = 1.702
"""The factor in CLIP's activation."""


@dataclass(frozen=True, slots=True)
class _Activation:
    """What oneDNN computes of `factor` times an activation's values is so many times the activation.

    name, algorithm: what torch calls it.
    """

    name: str
    algorithm: str = ""
    factor: float = 1.0


ACTIVATIONS: dict[type[nn.Module], _Activation] = {
    GELUActivation: _Activation("gelu", "none"),
    QuickGELUActivation: _Activation("swish", factor=QUICK),
}


class _Attention(Changed):
    """Self-attention of CLIP's and DINOv2's blocks, where every token sees every other."""

    config: Any
    head_dim: int
    is_causal: bool
    out_proj: Any
    o_proj: Any

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **given: Any) -> Any:
        learns = self.training or torch.is_grad_enabled()
        sdpa = self.config._attn_implementation == "sdpa"  # noqa: SLF001 (its only name)
        masked = attention_mask is not None or self.is_causal
        if learns or not sdpa or masked or not hidden_states.is_cpu:
            return super().forward(hidden_states, attention_mask, **given)
        projected = (getattr(self, name)(hidden_states) for name in ("q_proj", "k_proj", "v_proj"))
        by_head = [each.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for each in projected]
        queries, keys, values = by_head
        outward = self.out_proj if hasattr(self, "out_proj") else self.o_proj
        return outward(looked_at_all(queries, keys, values, self.head_dim**-0.5)), None


class _QuickGELU(Changed):
    """CLIP's activation in one place, bit for bit: caches do not hold three times what patches take."""

    def forward(self, input: Tensor) -> Any:  # noqa: A002 (the base class's name for it)
        if torch.is_grad_enabled() or not input.is_cpu:
            return super().forward(input)
        return input.mul(QUICK).sigmoid_().mul_(input)


class _MLP(Changed):
    """`fc2(activation(fc1(x)))` in two products, up to the rounding of float32."""

    fused: tuple[Copies, Copies, Untouched] | None = None

    def forward(self, hidden_states: Tensor) -> Any:
        if self.fused is not None:
            first, second, untouched = self.fused
            inner = first.product(hidden_states) if untouched else None
            if inner is not None and (found := second.product(inner)) is not None:
                return found
        return super().forward(hidden_states)


def change_tower_attention(module: Any) -> None:
    """If it is one of `ATTENTION`."""
    original: Any = type(module)
    if original.__name__ in ATTENTION:
        module.__class__ = changed_class(original, _Attention)


def change_activation(module: Any) -> None:
    """If it is CLIP's."""
    if type(module) is QuickGELUActivation:
        module.__class__ = changed_class(QuickGELUActivation, _QuickGELU)


def fusible_layers(module: Any) -> tuple[CpuLinear, CpuLinear] | None:
    """The layers of one of `MLPS` with one of `ACTIVATIONS`; None: it is none, or they stay by themselves.

    In 16 bits weights are no longer what they were after a factor.
    """
    if type(module).__name__ not in MLPS or type(module.activation_fn) not in ACTIVATIONS:
        return None
    first, second = module.fc1, module.fc2
    if not (isinstance(first, CpuLinear) and isinstance(second, CpuLinear)):
        return None
    exact = first.weight.dtype is torch.float32 or ACTIVATIONS[type(module.activation_fn)].factor == 1
    return (first, second) if exact and first.weight.dtype is second.weight.dtype else None


def fuse(module: Any) -> None:
    """Keep copies of its `fusible_layers` in oneDNN's order."""
    activation = ACTIVATIONS[type(module.activation_fn)]
    first = Copies(module.fc1, gives=activation.factor, activation=(activation.name, activation.algorithm))
    second = Copies(module.fc2, takes=activation.factor)
    first.pack()
    second.pack()
    original: Any = type(module)
    module.__class__ = changed_class(original, _MLP)
    module.fused = first, second, Untouched((module, module.fc1, module.activation_fn, module.fc2))
