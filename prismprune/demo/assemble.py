"""Puts the demo model together: pretrained parts + what this project trained -> one ordinary checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from prismprune.demo import CHAT_TEMPLATE, LANGUAGE_FORMAT, WEIGHTS
from prismprune.demo.parts import LANGUAGE, VISION, Progress, fetch

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import (
        Dinov2Model,
        LlamaForCausalLM,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerBase,
    )

IMAGE_SIZE = 336
VIDEO_IMAGE_SIZE = 224
PATCH_SIZE = 14
VISION_LAYER = 9  # of 12: color and place are read best there (a linear probe; see the model card)
IMAGE_TOKEN = "<image>"  # noqa: S105 (a placeholder in prompts)
_RENAMES = (
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
)
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_STEPS = 5


def assemble(target: Path, weights: Path = WEIGHTS, progress: Progress | None = None) -> None:
    """Write the checkpoint with the trained `weights` merged in."""
    report = progress or (lambda _what, _done, _steps: None)
    report("fetching the vision tower", 0, _STEPS)
    fetch(VISION, progress)
    report("fetching the language model", 1, _STEPS)
    fetch(LANGUAGE, progress)
    report("converting", 2, _STEPS)
    language, tokenizer = language_part()
    model = build_model(vision_tower(), language, tokenizer)
    report("merging the trained weights", 3, _STEPS)
    merge(model, weights)
    as_published(model.model.language_model)
    report("saving", 4, _STEPS)
    model.save_pretrained(target)
    build_processor(tokenizer).save_pretrained(target)
    report("saving", _STEPS, _STEPS)


def merge(model: LlavaForConditionalGeneration, weights: Path) -> None:
    """Load the trained projector and fold the adapter into the language model."""
    from peft import PeftModel  # noqa: PLC0415 (only needed to assemble)

    state = load_file(weights / "projector.safetensors")
    model.model.multi_modal_projector.load_state_dict(state)
    adapted = PeftModel.from_pretrained(model.model.language_model, str(weights))
    model.model.language_model = adapted.merge_and_unload()


@torch.no_grad()
def as_published(language: torch.nn.Module) -> None:
    """Round the weights to `LANGUAGE_FORMAT`, as checkpoints are published; the file holds float32."""
    for weight in language.parameters():
        weight.copy_(weight.to(getattr(torch, LANGUAGE_FORMAT)))


def build_processor(tokenizer: PreTrainedTokenizerBase) -> LlavaProcessor:
    """Pictures are resized to the square as they are, uncropped, so that nothing at an edge is lost."""
    from transformers import CLIPImageProcessor, LlavaProcessor  # noqa: PLC0415

    images = CLIPImageProcessor(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        do_center_crop=False,
        image_mean=IMAGE_MEAN,
        image_std=IMAGE_STD,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def vision_tower() -> Dinov2Model:
    """The ViT-S/14 as transformers' `Dinov2Model`: 12 layers, 384 wide, 6 heads, 37 x 37 positions."""
    import onnx  # noqa: PLC0415 (only needed to assemble)
    from transformers import Dinov2Config, Dinov2Model  # noqa: PLC0415

    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=PATCH_SIZE
    )
    model: Dinov2Model = Dinov2Model(config).eval()
    graph = onnx.load(str(fetch(VISION))).graph
    state = _dinov2_state(graph)
    missing, unexpected = model.load_state_dict(state, strict=False)
    # The mask token serves masked training only and is not part of the export.
    if unexpected or set(missing) - {"embeddings.mask_token"}:
        raise RuntimeError(f"the vision part does not fit Dinov2Model: {missing} {unexpected}")
    return model


def _dinov2_state(graph: Any) -> dict[str, torch.Tensor]:
    """Rename an ONNX export's initialisers to `Dinov2Model`'s; matrix products store their transpose."""
    from onnx import numpy_helper  # noqa: PLC0415

    arrays = {item.name: torch.from_numpy(numpy_helper.to_array(item).copy()) for item in graph.initializer}
    state = {
        _renamed(name.removeprefix("backbone.")): array
        for name, array in arrays.items()
        if name.startswith("backbone.")
    }
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in arrays:
            path = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            state[_renamed(f"{path}.weight")] = arrays[node.input[1]].T.contiguous()
    # Constant folding has split the positions into the CLS token's and the patches'.
    patches = next(array for name, array in arrays.items() if tuple(array.shape) == (1, 37 * 37, 384))
    cls_position = next(
        array
        for name, array in arrays.items()
        if name.startswith("onnx::Concat") and array.shape == (1, 1, 384)
    )
    state["embeddings.position_embeddings"] = torch.cat([cls_position, patches], dim=1)
    return state


def _renamed(name: str) -> str:
    for old, new in _RENAMES:
        name = name.replace(old, new)
    return name


def language_part() -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct, dequantized to float32, with its tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    file = fetch(LANGUAGE)
    loaded = LlamaForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # A model loaded from GGUF cannot be saved; a fresh one with the same weights can.
    settings = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    model.load_state_dict(loaded.state_dict())
    return model, AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def build_model(
    tower: Dinov2Model, language: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> LlavaForConditionalGeneration:
    """Join the parts to one `LlavaForConditionalGeneration`, its projector fresh; extends `tokenizer`."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration  # noqa: PLC0415

    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    settings: dict[str, Any] = {
        "vision_config": tower.config.to_dict(),
        "text_config": language.config.to_dict() | {"vocab_size": len(tokenizer)},
        "image_token_id": tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        "vision_feature_layer": VISION_LAYER,
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
        "image_seq_length": (IMAGE_SIZE // PATCH_SIZE) ** 2,
        "tie_word_embeddings": True,
        "video_image_size": VIDEO_IMAGE_SIZE,  # ours: a clip's frames are smaller than pictures
    }
    config = LlavaConfig(**settings)
    language.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model: LlavaForConditionalGeneration = LlavaForConditionalGeneration(config).eval()
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.tie_weights()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = end
    return model
