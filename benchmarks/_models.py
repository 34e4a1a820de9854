"""What the benchmarks load: models with random weights, a processor without a vocabulary, and how."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    CLIPImageProcessor,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from benchmarks import published
from benchmarks.published import VICUNA_7B, VICUNA_13B
from prismprune import PrunedVLM
from prismprune.families.llava import LlavaFamily
from prismprune.loading import Loaded
from worker.settings import WorkerSettings

if TYPE_CHECKING:
    from collections.abc import Callable

PACKED_BYTES: int = WorkerSettings.model_fields["packed_weights_bytes"].default
"""So that the library in a benchmark's process multiplies as the service's worker does."""
SIDE, PATCH = 336, 14
IMAGE_TOKEN_ID = 2
LANGUAGE_MODELS = {"llava-1.5-7b": VICUNA_7B, "llava-1.5-13b": VICUNA_13B}
LAYERS = {name: LlamaConfig(**shape).num_hidden_layers for name, shape in LANGUAGE_MODELS.items()}
"""Of the whole models."""


def word_processor() -> LlavaProcessor:
    """A processor of 336 x 336 pictures for a tower with a CLS token, whose tokenizer knows no word."""
    vocabulary = {token: place for place, token in enumerate(["<pad>", "<end>", "<image>", "<unk>"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106 (a word)
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",  # noqa: S106
        eos_token="<end>",  # noqa: S106
        unk_token="<unk>",  # noqa: S106
        additional_special_tokens=["<image>"],
    )
    square = {"height": SIDE, "width": SIDE}
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(size=square, crop_size=square, do_center_crop=False),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template="{% for part in messages[0]['content'] %}"
        "{{ '<image> ' if part['type'] == 'image' else part['text'] }}{% endfor %}",
    )


def llava(name: str, layers: int, *, nf4: bool) -> PrunedVLM:
    """LLaVA-1.5's geometry, tower and projector whole, the language model with so many of its layers.

    Weights are random, in float32; of the language model's layers in NF4 where asked for. They are made one
    layer after the other, so that no more than one is ever held unquantized.
    """
    shape = LANGUAGE_MODELS[name] | {"num_hidden_layers": 1}
    config = published.llava(LlavaConfig, published.clip_l(SIDE), shape, image_token_index=IMAGE_TOKEN_ID)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    finish: Callable[[nn.Module], nn.Module] = quantized if nf4 else nn.Module.eval
    stack, own = model.model.language_model.layers, model.config.text_config
    stack[0] = finish(stack[0])
    for place in range(1, layers):
        stack.append(finish(LlamaDecoderLayer(own, place).eval()))
    own.num_hidden_layers = layers
    model.generation_config = GenerationConfig(pad_token_id=0)
    family = LlavaFamily(model.requires_grad_(requires_grad=False), word_processor())
    return PrunedVLM(Loaded(name, family, frozenset(), None, "nf4" if nf4 else None))


def quantized(layer: nn.Module) -> nn.Module:
    """Its linear layers in NF4 with double quantization, as the library loads them, computing in float32."""
    for parent in list(layer.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, _quantized(child))
    return layer


def _quantized(linear: nn.Linear) -> nn.Module:
    from bitsandbytes import nn as quantizing  # noqa: PLC0415 (an extra)

    kind: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": True}
    layers: Any = quantizing  # which has no types
    shape = linear.in_features, linear.out_features
    made = layers.Linear4bit(*shape, bias=False, compute_dtype=torch.float32, device="meta", **kind)
    made.weight = layers.Params4bit(linear.weight.detach(), requires_grad=False, **kind)
    moved: nn.Module = made.to("cpu")  # which quantizes
    return moved
