"""The checkpoint that every side serves: LLaVA-1.5's shape at a size that two cores can carry.

    python -m benchmarks.serving.checkpoint FOLDER

A CLIP-shaped ViT-S/14 at 336 pixels (12 layers, 384 wide, 576 patches) and a projector, both with random
weights of a fixed seed, on SmolLM2-135M, the demo's language model; all in float16, the format in which
LLaVA-1.5 is published. What is measured does not depend on what the answers say, as long as each is text of
the asked length: so the special tokens, that which ends an answer among them, have rows of zeros in the tied
embedding. Their logits are always 0, the likeliest token's is not.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import GenerationConfig, LlavaConfig, LlavaForConditionalGeneration

from benchmarks.published import clip, llava
from prismprune.demo.assemble import IMAGE_SIZE, IMAGE_TOKEN, PATCH_SIZE, build_processor, language_part

if TYPE_CHECKING:
    from torch import Tensor

END_TOKEN = "<|never|>"  # noqa: S105 -- no password: a token
VISUAL_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
MAX_POSITIONS = 2048
TOWER, PUBLISHED_TOWER = "vision_tower.", "vision_tower.vision_model."
"""transformers 5 names the tower's weights otherwise than LLaVA's published checkpoints and vLLM."""


@dataclass(frozen=True)
class Checkpoint:
    """One model, in a folder each way of naming its weights."""

    folder: Path

    @property
    def transformers(self) -> Path:
        return self.folder / "transformers"

    @property
    def published(self) -> Path:
        return self.folder / "published"


def checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`, written there first if it is not."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            made = Checkpoint(Path(scratch) / "made")
            write(made)
            made.folder.rename(folder)
    return Checkpoint(folder)


def write(target: Checkpoint) -> None:
    """Write both layouts, the same weights in each."""
    model, processor = build()
    model.save_pretrained(target.transformers)
    processor.save_pretrained(target.transformers)
    target.published.mkdir()
    for file in target.transformers.iterdir():
        if file.suffix == ".safetensors":
            save_file(renamed(file), target.published / file.name, {"format": "pt"})
        elif ".safetensors." not in file.name:  # an index would name the weights as they were
            shutil.copy(file, target.published)


def build(seed: int = 0) -> tuple[LlavaForConditionalGeneration, Any]:
    """The model in float16, and its processor."""
    language, tokenizer = language_part()
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN], "eos_token": END_TOKEN})
    image, end = map(tokenizer.convert_tokens_to_ids, (IMAGE_TOKEN, END_TOKEN))
    language.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    text = {key: value for key, value in language.config.to_dict().items() if "name_or_path" not in key} | {
        "vocab_size": len(tokenizer),
        "eos_token_id": end,
        "max_position_embeddings": MAX_POSITIONS,
    }
    config = llava(
        LlavaConfig,
        clip(384, 12, 6, IMAGE_SIZE),
        text,
        image_token_index=image,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=VISUAL_TOKENS,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).eval()
    model.model.language_model.load_state_dict(language.model.state_dict())
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.all_special_ids] = 0
    model.generation_config = GenerationConfig(
        eos_token_id=end, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id
    )
    return model.half(), build_processor(tokenizer)


def renamed(file: Path) -> dict[str, Tensor]:
    """The weights of a file under the names of published checkpoints."""
    with safe_open(file, "pt") as weights:
        names = list(weights.keys())
        return {name.replace(TOWER, PUBLISHED_TOWER, 1): weights.get_tensor(name) for name in names}


if __name__ == "__main__":
    checkpoint(Path(sys.argv[1]))
