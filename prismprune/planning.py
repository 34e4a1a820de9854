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
from prismprune.hub import origin_of
from prismprune.loading import check_head, resolve, torch_dtype
from prismprune.quantization import DTYPES, Quantization

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prismprune.families.base import Family

NF4_BLOCK, NF4_SCALES = 64, 256
"""Weights that share a scale in NF4, and scales that share one of their own (double quantization)."""


@dataclass(frozen=True, slots=True)
class Need:
    """What one request needs at a budget. Bytes, and floating point operations of the prefill, text included.

    prefill_flops: 2 * T * (2 n d (d + kv_width) + 2 n^2 d + 3 n d m) for n tokens, T layers, width d and MLP
        width m (gated), as published figures count it: attention to all, masked or not.
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
    quantization: str | Quantization | None = None,
    text_tokens: int = 64,
    visual_tokens: int | None = None,
) -> Plan:
    """Plan for a hub id, `"prism-demo"`, or a directory, of which `config.json` is enough.

    text_tokens: of the prompt and the answer. visual_tokens: before pruning; None: of one picture
    (LLaVA-NeXT: cut into 2 x 2 crops; Video-LLaVA: one clip of 8 frames; Qwen2.5-VL: 672 pixels square).

    Raises `UnknownModelError` without a config or an adapter for it, `InvalidBudgetError`, and
    `InvalidOptionError` for an option out of its range.
    """
    if dtype not in DTYPES:
        raise InvalidOptionError(f"dtype is one of {', '.join(DTYPES)}.")
    if text_tokens < 1 or (visual_tokens is not None and visual_tokens < 1):
        raise InvalidOptionError("A prompt has at least one token of each kind.")
    quantized, itemsize = Quantization.of(quantization), torch_dtype(dtype).itemsize
    config = _config(model)
    family = family_of(config.model_type)
    if quantized:
        check_head(quantized, config)
    blank = _blank(config)
    original = visual_tokens or family.visual_tokens_of(config)
    kept = TokenBudget.parse(token_budget).resolve(original)
    weight_bytes = sum(_weight_bytes(blank, family, itemsize, quantized))
    request = _Request(config, original, text_tokens, itemsize, weight_bytes)
    return Plan(
        model=model,
        family=family.name,
        dtype=dtype,
        quantization=str(quantized) if quantized else None,
        parameters=sum(parameter.numel() for parameter in blank.parameters()),
        text_tokens=text_tokens,
        budget=request.at(kept),
        everything=request.at(original),
    )


def _config(model: str) -> Any:
    try:
        path = resolve(model)
        return AutoConfig.from_pretrained(path, **origin_of(path))
    except (OSError, ValueError) as error:
        raise UnknownModelError(
            f"No config could be read from {model!r}: it is neither a directory with a config.json nor a "
            "hub id that can be reached from here or is in the hub's cache."
        ) from error


def _blank(config: Any) -> nn.Module:
    """The model without values: every module and the shape of every parameter."""
    with torch.device("meta"):
        blank: nn.Module = AutoModelForImageTextToText.from_config(config)
    return blank


def _weight_bytes(
    model: nn.Module, family: type[Family], itemsize: int, quantization: Quantization | None
) -> Iterator[int]:
    """Of each parameter; the linear layers that are quantized as bitsandbytes stores them."""
    quantized = {} if quantization is None else _linear_layers(model, quantization.spared(family.outside))
    for parameter in model.parameters():
        layer = quantized.get(id(parameter))
        if layer is None or quantization is None:
            yield parameter.numel() * itemsize
        elif quantization.kind == "int8":
            yield parameter.numel() + 4 * layer.out_features
        else:
            scales = -(-parameter.numel() // NF4_BLOCK)
            doubly = scales + 4 * -(-scales // NF4_SCALES)
            yield -(-parameter.numel() // 2) + (doubly if quantization.double_quant else 4 * scales)


def _linear_layers(model: nn.Module, spared: list[str]) -> dict[int, nn.Linear]:
    """By the id of its weight, each linear layer that is in none of the modules named."""
    return {
        id(module.weight): module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not f"{name}.".startswith(tuple(f"{one}." for one in spared))
    }


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
        prefill_row = 4 * width + 2 * kv_width + 2 * inner
        return Need(
            visual_tokens=visual,
            prompt_tokens=n,
            weight_bytes=self.weight_bytes,
            kv_bytes=2 * layers * n * kv_width * self.itemsize,
            activation_bytes=max(n * prefill_row, self.original * self._tower_row()) * self.itemsize,
            prefill_flops=decoder_flops(text, n, n),
        )

    def _tower_row(self) -> int:
        """What the tower holds of a visual token: input, residual, query, key, value, output, MLP row."""
        tower = self.config.vision_config
        patches = getattr(tower, "spatial_merge_size", 1) ** 2  # Qwen2.5-VL makes one token of so many
        return int(patches * (6 * tower.hidden_size + _tower_inner(tower)))


@dataclass(frozen=True, slots=True)
class StageFlops:
    """Floating point operations that an answer in LLaVA's shape cannot do without, by stage.

    vision: the tower of N patches, d wide, as far as its output is used, and the projector for the K that
        stay: 2 * (N * 3 p^2 d + B * (4 n d^2 + 2 n^2 d + 2 n d m) + K * w (d + w)) for n = N + 1 tokens, B
        blocks with MLPs of m, patches of p pixels, and a language model w wide. Where only M patches are
        looked at, the last block is 2 n d^2 + M * (2 d^2 + 2 n d + 2 d m).
    prefill: see `Need`, but each token attends to those before it and itself alone, n (n + 1) d for 2 n^2 d,
        and of the last layer there are no more than queries, keys and values for any token but the last, and
        the head for that. token: the first decoding step after it.
    """

    vision: int
    prefill: int
    token: int


def stage_flops(config: Any, kept: int, text_tokens: int, looked_at: int | None = None) -> StageFlops:
    """Of one picture with `kept` visual tokens, and a prompt with `text_tokens` others.

    looked_at: patches that the method may keep or compares; None: all, and the CLS token.
    """
    tower, text, prompt = config.vision_config, config.get_text_config(), kept + text_tokens
    patches, width, wide = config.image_seq_length, tower.hidden_size, text.hidden_size
    tokens, blocks = patches + 1, config.vision_feature_layer % (tower.num_hidden_layers + 1)

    def block(rows: int) -> int:
        each = 2 * width**2 + 2 * tokens * width + 2 * width * _tower_inner(tower)
        return int(2 * tokens * width**2 + rows * each)

    embedding = patches * 3 * tower.patch_size**2 * width
    vision = embedding + (blocks - 1) * block(tokens) + block(tokens if looked_at is None else looked_at)
    head = 2 * wide * text.vocab_size
    return StageFlops(
        vision=2 * (vision + kept * wide * (width + wide)),
        prefill=_prefill_flops(text, prompt) + head,
        token=decoder_flops(text, 1, prompt + 1) + head,
    )


def decoder_flops(text: Any, tokens: int, context: int) -> int:
    """Of a language model's layers, for so many tokens that see `context` each; see `Need`."""
    layer = _projections(text, tokens) + _attention_and_mlp(text, tokens, tokens * context)
    return int(text.num_hidden_layers * layer)


def _prefill_flops(text: Any, prompt: int) -> int:
    """See `StageFlops`."""
    projections, pairs = _projections(text, prompt), prompt * (prompt + 1) // 2
    before = (text.num_hidden_layers - 1) * (projections + _attention_and_mlp(text, prompt, pairs))
    return int(before + projections + _attention_and_mlp(text, 1, prompt))


def _projections(text: Any, tokens: int) -> int:
    """To queries, keys and values, in one layer."""
    width = text.hidden_size
    head = getattr(text, "head_dim", None) or width // text.num_attention_heads
    return int(2 * tokens * width * (width + 2 * head * text.num_key_value_heads))


def _attention_and_mlp(text: Any, tokens: int, pairs: int) -> int:
    """All behind them, in one layer. pairs: of a token and one that it sees."""
    width = text.hidden_size
    return int(2 * (tokens * width * (width + 3 * text.intermediate_size) + 2 * pairs * width))


def _tower_inner(tower: Any) -> int:
    """Width of the tower's MLP."""
    ratio = getattr(tower, "mlp_ratio", None)  # DINOv2 has no `intermediate_size`
    return int(ratio * tower.hidden_size if ratio else tower.intermediate_size)
