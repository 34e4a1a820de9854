"""What a model will need, from its config alone: its parameters are counted, and none of them is made.

Weights and keys and values are counts; what one pass takes besides is an estimate. All bytes are of one
request: what a budget saves in keys and values is multiplied by the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from prismprune.budget import TokenBudget
from prismprune.errors import InvalidOptionError, UnknownModelError
from prismprune.families import family_of
from prismprune.loading import DTYPES, QUANTIZATIONS, resolve

if TYPE_CHECKING:
    from collections.abc import Iterator

NF4_BLOCK, NF4_SCALES = 64, 256
"""Weights that share a scale in NF4, and scales that share one of their own (double quantisation)."""


@dataclass(frozen=True, slots=True)
class Need:
    """What one request needs at a budget. Bytes, and floating point operations of the prefill, text included.

    prefill_flops: 2 * T * (2 n d (d + kv_width) + 2 n^2 d + 3 n d m) for n tokens, T layers, width d and MLP
        width m (gated).
    kv_bytes: 2 * T * n * kv_width * bytes.
    activation_bytes: estimate of the larger of two peaks, the tower's over one picture or clip and the
        prefill's. Each token holds its input, queries, keys, values and output, and the MLP's inner rows.
    """

    visual_tokens: int
    prompt_tokens: int
    weight_bytes: int
    kv_bytes: int
    activation_bytes: int
    prefill_flops: int

    @property
    def total_bytes(self) -> int:
        """Weights, cache and one pass."""
        return self.weight_bytes + self.kv_bytes + self.activation_bytes


@dataclass(frozen=True, slots=True)
class Plan:
    """A model at a budget, and with every visual token."""

    model: str
    family: str
    dtype: str
    quantization: str | None
    parameters: int
    text_tokens: int
    budget: Need
    everything: Need


def plan(
    model: str,
    token_budget: int | str | TokenBudget | None = None,
    *,
    dtype: str = "float16",
    quantization: str | None = None,
    text_tokens: int = 64,
    visual_tokens: int | None = None,
) -> Plan:
    """Plan for a hub id, `"prism-demo"`, or a directory, of which `config.json` is enough.

    text_tokens: of the prompt and the answer. visual_tokens: before pruning; None: of one picture
    (LLaVA-NeXT: cut into 2 x 2 crops; Video-LLaVA: one clip of 8 frames).

    Raises `UnknownModelError` without a config or an adapter for it, `InvalidBudgetError`, and
    `InvalidOptionError` for an option out of its range.
    """
    if dtype not in DTYPES:
        raise InvalidOptionError(f"dtype is one of {', '.join(DTYPES)}.")
    if quantization is not None and quantization not in QUANTIZATIONS:
        raise InvalidOptionError(f"quantization is one of {', '.join(QUANTIZATIONS)}, or none at all.")
    if text_tokens < 1 or (visual_tokens is not None and visual_tokens < 1):
        raise InvalidOptionError("A prompt has at least one token of each kind.")
    config = _config(model)
    family = family_of(config.model_type)
    blank = _blank(config)
    original = visual_tokens or family.visual_tokens_of(config)
    kept = TokenBudget.parse(token_budget).resolve(original)
    weight_bytes = sum(_weight_bytes(blank, family.unquantised(), DTYPES[dtype].itemsize, quantization))
    request = _Request(config, original, text_tokens, DTYPES[dtype].itemsize, weight_bytes)
    return Plan(
        model=model,
        family=family.name,
        dtype=dtype,
        quantization=quantization,
        parameters=sum(parameter.numel() for parameter in blank.parameters()),
        text_tokens=text_tokens,
        budget=request.at(kept),
        everything=request.at(original),
    )


def _config(model: str) -> Any:
    try:
        return AutoConfig.from_pretrained(resolve(model))
    except (OSError, ValueError) as error:
        raise UnknownModelError(
            f"No config could be read from {model!r}: it is neither a directory with a config.json nor a "
            "hub id that can be reached from here."
        ) from error


def _blank(config: Any) -> nn.Module:
    """The model without values: every module and the shape of every parameter."""
    with torch.device("meta"):
        blank: nn.Module = AutoModelForImageTextToText.from_config(config)
    return blank


def _weight_bytes(
    model: nn.Module, unquantised: list[str], itemsize: int, quantization: str | None
) -> Iterator[int]:
    """Of each parameter; the linear layers outside of `unquantised` as bitsandbytes stores them."""
    quantised = {
        id(module.weight): module
        for name, module in model.named_modules()
        if quantization and isinstance(module, nn.Linear) and not name.startswith(tuple(unquantised))
    }
    for parameter in model.parameters():
        layer = quantised.get(id(parameter))
        if layer is None:
            yield parameter.numel() * itemsize
        elif quantization == "int8":
            yield parameter.numel() + 4 * layer.out_features
        else:
            scales = -(-parameter.numel() // NF4_BLOCK)
            yield -(-parameter.numel() // 2) + scales + 4 * -(-scales // NF4_SCALES)


@dataclass(frozen=True, slots=True)
class _Request:
    """A prompt about media of `original` visual tokens, for a model whose numbers have `itemsize` bytes."""

    config: Any
    original: int
    text_tokens: int
    itemsize: int
    weight_bytes: int

    def at(self, visual: int) -> Need:
        """What it needs when so many of the visual tokens stay."""
        text, n = self.config.get_text_config(), visual + self.text_tokens
        width, inner, layers = text.hidden_size, text.intermediate_size, text.num_hidden_layers
        head = getattr(text, "head_dim", None) or width // text.num_attention_heads
        kv_width = head * text.num_key_value_heads
        macs = layers * (2 * n * width * (width + kv_width) + 2 * n * n * width + 3 * n * width * inner)
        prefill_row = 4 * width + 2 * kv_width + 2 * inner
        return Need(
            visual_tokens=visual,
            prompt_tokens=n,
            weight_bytes=self.weight_bytes,
            kv_bytes=2 * layers * n * kv_width * self.itemsize,
            activation_bytes=max(n * prefill_row, self.original * self._tower_row()) * self.itemsize,
            prefill_flops=2 * macs,
        )

    def _tower_row(self) -> int:
        """What the tower holds of a patch: input, residual, queries, keys, values, output, the MLP's row."""
        tower = self.config.vision_config
        ratio = getattr(tower, "mlp_ratio", None)  # DINOv2 has no `intermediate_size`
        return int(6 * tower.hidden_size + (ratio * tower.hidden_size if ratio else tower.intermediate_size))
