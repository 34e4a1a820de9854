"""The checkpoint that every side serves: LLaVA-1.5's shape at a size that two cores can carry.

    python -m benchmarks.serving.checkpoint FOLDER

Or, for a GPU, of LLaVA-1.5's own size (`benchmarks.serving --geometry`), all of it random. The small one:
a CLIP-shaped ViT-S/14 at 336 pixels (12 layers, 384 wide, 576 patches) and a projector, both with random
weights of a fixed seed, on SmolLM2-135M, the demo's language model; all in float16, the format in which
LLaVA-1.5 is published. What is measured does not depend on what the answers say, as long as each is text of
the asked length: so the special tokens, that which ends an answer among them, have rows of zeros in the tied
embedding. Their logits are always 0, the likeliest token's is not.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import GenerationConfig, LlavaConfig, LlavaForConditionalGeneration

from benchmarks._models import GEOMETRIES, numbers
from benchmarks.published import clip, clip_l, llava
from prismprune.demo.assemble import IMAGE_SIZE, IMAGE_TOKEN, PATCH_SIZE, build_processor, language_part

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import CLIPVisionConfig

END_TOKEN = "<|never|>"  # noqa: S105 -- no password: a token
FOLDER = "checkpoint-float16"
"""Below the benchmarks' cache."""
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

    def published(self) -> Path:
        """The names of published checkpoints, which vLLM reads; written when first asked for."""
        folder = self.folder / "published"
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
                made = Path(scratch) / "made"
                publish(self.transformers, made)
                made.rename(folder)
        return folder


def checkpoint(folder: Path, geometry: str | None = None, device: str = "cpu") -> Checkpoint:
    """The checkpoint in `folder`, written there first if it is not; `device` is where it is made.

    geometry: one of `GEOMETRIES` with a single view a picture; None: the small one.
    """
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            made = Checkpoint(Path(scratch) / "made")
            model, processor = build() if geometry is None else build_large(geometry, device)
            model.save_pretrained(made.transformers)
            processor.save_pretrained(made.transformers)
            torch.cuda.empty_cache()  # the servers need it
            made.folder.rename(folder)
    return Checkpoint(folder)


def publish(source: Path, target: Path) -> None:
    """Copy a checkpoint, the same weights under other names."""
    target.mkdir()
    for file in source.iterdir():
        if file.suffix == ".safetensors":
            save_file(renamed(file), target / file.name, {"format": "pt"})
        elif ".safetensors." not in file.name:  # an index would name the weights as they were
            shutil.copy(file, target)


def build(seed: int = 0) -> tuple[LlavaForConditionalGeneration, Any]:
    """The small model in float16, and its processor."""
    language, tokenizer = language_part()
    image, end = with_tokens(tokenizer)
    language.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    text = {key: value for key, value in language.config.to_dict().items() if "name_or_path" not in key}
    torch.manual_seed(seed)
    config = configured(clip(384, 12, 6, IMAGE_SIZE), text, tokenizer, image, end, tied=True)
    model = LlavaForConditionalGeneration(config).eval()
    model.model.language_model.load_state_dict(language.model.state_dict())
    return finished(model.half(), tokenizer, end)


def build_large(geometry: str, device: str, seed: int = 0) -> tuple[LlavaForConditionalGeneration, Any]:
    """A model of that size in float16, made on `device`, with the small one's tokens; and its processor."""
    _, tokenizer = language_part()
    image, end = with_tokens(tokenizer)
    torch.manual_seed(seed)
    config = configured(clip_l(IMAGE_SIZE), GEOMETRIES[geometry].text, tokenizer, image, end, tied=False)
    with torch.device(device), numbers(torch.float16):
        model = LlavaForConditionalGeneration(config).eval()
    model, processor = finished(model, tokenizer, end)
    return model.cpu(), processor


def with_tokens(tokenizer: Any) -> tuple[int, int]:
    """Adds the tokens that stand for a visual one and for an answer's end; their ids."""
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN], "eos_token": END_TOKEN})
    image, end = map(tokenizer.convert_tokens_to_ids, (IMAGE_TOKEN, END_TOKEN))
    return image, end


def configured(
    tower: CLIPVisionConfig, text: dict[str, Any], tokenizer: Any, image: int, end: int, *, tied: bool
) -> LlavaConfig:
    """LLaVA-1.5's config. tied: the head has the embedding's weights."""
    own = {"vocab_size": len(tokenizer), "eos_token_id": end, "max_position_embeddings": MAX_POSITIONS}
    return llava(
        LlavaConfig,
        tower,
        text | own,
        image_token_index=image,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=VISUAL_TOKENS,
        tie_word_embeddings=tied,
    )


@torch.no_grad()
def finished(
    model: LlavaForConditionalGeneration, tokenizer: Any, end: int
) -> tuple[LlavaForConditionalGeneration, Any]:
    """With special tokens that are never the likeliest, and its processor."""
    parts: list[Any] = [model.get_input_embeddings(), model.lm_head]
    for part in parts:
        part.weight[tokenizer.all_special_ids] = 0
    model.generation_config = GenerationConfig(
        eos_token_id=end, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id
    )
    return model, build_processor(tokenizer)


def renamed(file: Path) -> dict[str, Tensor]:
    """The weights of a file under the names of published checkpoints."""
    with safe_open(file, "pt") as weights:
        names = list(weights.keys())
        return {name.replace(TOWER, PUBLISHED_TOWER, 1): weights.get_tensor(name) for name in names}


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("folder", type=Path, help="written unless it is there")
    checkpoint(parser.parse_args().folder)


if __name__ == "__main__":
    main()
