"""What the benchmarks load: models with random weights, a processor without a vocabulary, and how."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass
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
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from benchmarks import published
from benchmarks.published import VICUNA_7B, VICUNA_13B
from prismprune import PrunedVLM
from prismprune.cpu_layers import use_cpu_products
from prismprune.families import FAMILIES
from prismprune.heap import keep_freed_memory, with_large_pages
from prismprune.loading import Loaded, pack_only_what_fits
from worker.settings import WorkerSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from prismprune.replay import GraphBytes

PACKED_BYTES: int = WorkerSettings.model_fields["packed_weights_bytes"].default
"""So that the library in a benchmark's process multiplies as the service's worker does."""
CUDA_GRAPH_BYTES: GraphBytes = WorkerSettings.model_fields["cuda_graph_bytes"].default
"""And decodes as it does."""
WARM_UP_CUDA = 3
"""Rounds. The second prompt of a size is recorded on CUDA, and some of the third one's, too."""
SIDE, PATCH = 336, 14
IMAGE_TOKEN_ID = 2


@dataclass(frozen=True)
class Geometry:
    """A published model's shape. crops: views of a picture of 640 x 480, packed as in the paper."""

    text: dict[str, Any]
    crops: int = 1

    @property
    def layers(self) -> int:
        """Of the language model."""
        return LlamaConfig(**self.text).num_hidden_layers


GEOMETRIES = {
    "llava-1.5-7b": Geometry(VICUNA_7B),
    "llava-1.5-13b": Geometry(VICUNA_13B),
    "llava-1.6-7b": Geometry(VICUNA_7B, crops=5),
    "llava-1.6-13b": Geometry(VICUNA_13B, crops=5),
}


def as_the_worker(threads: int) -> None:
    """Make this process one that computes as the worker's serving process does; the first of all.

    What the supervisor puts into that one's environment is read as a program starts: this one starts anew.
    """
    from worker.process import SWITCH_S  # noqa: PLC0415 (19 MiB that no measured memory should have)

    environment = with_large_pages(os.environ)
    if environment != dict(os.environ):
        sys.stdout.flush()
        os.execve(sys.executable, sys.orig_argv, environment)  # noqa: S606 (this very command)
    keep_freed_memory()
    sys.setswitchinterval(SWITCH_S)
    torch.set_num_threads(threads)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """It knows no word."""
    vocabulary = {token: place for place, token in enumerate(["<pad>", "<end>", "<image>", "<unk>"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106 (a word)
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",  # noqa: S106
        eos_token="<end>",  # noqa: S106
        unk_token="<unk>",  # noqa: S106
        additional_special_tokens=["<image>"],
    )


def word_processor() -> LlavaProcessor:
    """A processor of 336 x 336 pictures for a tower with a CLS token, whose tokenizer knows no word."""
    square = {"height": SIDE, "width": SIDE}
    pixels = CLIPImageProcessor(size=square, crop_size=square, do_center_crop=False)
    return LlavaProcessor(image_processor=pixels, **_processing())


def word_processor_of_crops() -> LlavaNextProcessor:
    """The same of pictures in crops of that size, LLaVA-NeXT's own."""
    shapes = [[SIDE * rows, SIDE * columns] for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
    pixels = LlavaNextImageProcessor(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=shapes,
    )
    return LlavaNextProcessor(image_processor=pixels, **_processing())


def _processing() -> dict[str, Any]:
    return {
        "tokenizer": word_tokenizer(),
        "patch_size": PATCH,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "chat_template": "{% for part in messages[0]['content'] %}"
        "{{ '<image> ' if part['type'] == 'image' else part['text'] }}{% endfor %}",
    }


def random_llava(
    name: str,
    layers: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
    quantization: str | None = None,
    cuda_graph_bytes: GraphBytes = 0,
    plain: bool = False,
) -> PrunedVLM:
    """One of `GEOMETRIES`, tower and projector whole, the language model with so many of its layers.

    Weights are random, and the same each time; the language model's layers are quantized where asked for.
    They are made one layer after the other, so that no more than one is ever held unquantized. plain: on a
    CPU, too, its layers stay as transformers has them; otherwise they multiply as the worker's.
    """
    geometry = GEOMETRIES[name]
    shape = geometry.text | {"num_hidden_layers": 1}
    tower, token = published.clip_l(SIDE), {"image_token_index": IMAGE_TOKEN_ID}
    torch.manual_seed(0)
    with device, numbers(dtype):
        model: Any
        if geometry.crops == 1:
            model = LlavaForConditionalGeneration(published.llava(LlavaConfig, tower, shape, **token))
        else:
            model = LlavaNextForConditionalGeneration(published.llava(LlavaNextConfig, tower, shape, **token))
        finish = _finishing(quantization, dtype, device)
        stack, own = model.model.language_model.layers, model.config.text_config
        stack[0] = finish(stack[0])
        for place in range(1, layers):
            stack.append(finish(LlamaDecoderLayer(own, place)))
    own.num_hidden_layers = layers
    model.generation_config = GenerationConfig(pad_token_id=0)
    model.eval().requires_grad_(requires_grad=False)
    processor = word_processor() if geometry.crops == 1 else word_processor_of_crops()
    layout = None if geometry.crops == 1 else "paper"
    family = FAMILIES[model.config.model_type](model, processor, layout)
    if device.type == "cpu" and not plain:
        use_cpu_products(model, PACKED_BYTES, family.outside)
        if quantization == "nf4":
            pack_only_what_fits(model)
    loaded = Loaded(name, family, frozenset(), None, quantization)
    return PrunedVLM(loaded, cuda_graph_bytes=cuda_graph_bytes)


@contextmanager
def numbers(dtype: torch.dtype) -> Iterator[None]:
    """New tensors are in this format."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _finishing(
    quantization: str | None, dtype: torch.dtype, device: torch.device
) -> Callable[[nn.Module], nn.Module]:
    """What becomes of a layer: its linear ones in int8 or NF4, as the library loads them, or just itself."""
    if quantization is None:
        return nn.Module.eval

    def quantized(layer: nn.Module) -> nn.Module:
        for parent in list(layer.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, make(child))
        return layer.eval()

    def make(linear: nn.Linear) -> nn.Module:
        weight, shape = linear.weight.detach().cpu(), (linear.in_features, linear.out_features)
        made: Any
        if quantization == "int8":
            made = layers.Linear8bitLt(
                *shape, bias=False, has_fp16_weights=False, threshold=6.0, device="meta"
            )
            made.weight = layers.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        else:
            kind: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": True}
            made = layers.Linear4bit(*shape, bias=False, compute_dtype=dtype, device="meta", **kind)
            made.weight = layers.Params4bit(weight, requires_grad=False, **kind)
        moved: nn.Module = made.to(device)  # which quantizes
        return moved

    from bitsandbytes import nn as quantizing  # noqa: PLC0415 (an extra)

    layers: Any = quantizing  # which has no types
    return quantized
