"""Trains what the demo model adds to its pretrained parts: the projector and a low-rank adapter.

The vision tower and SmolLM2's own weights stay frozen. Scenes and clips are drawn on the fly from a fixed
seed. A part of the batches shows every visual token; the rest shows a random subset of them, so that a
token's place must be read from its features and not from its turn in the sequence. The subsets are random:
`prism` and the other selection methods take no part in training.
"""

from __future__ import annotations

import json
import math
import random
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from prismprune.demo.assemble import (
    PATCH_SIZE,
    VIDEO_IMAGE_SIZE,
    VISION_LAYER,
    build_model,
    language_part,
    vision_tower,
)
from prismprune.demo.clips import FRAMES, draw_clip
from prismprune.demo.easyvqa import EasyVQA
from prismprune.demo.packing import IGNORED, Pack, Packer, hidden_states
from prismprune.demo.questions import (
    LESSON_WEIGHTS,
    TRAINED,
    Question,
    clip_description,
    clip_questions,
    scene_descriptions,
    scene_questions,
)
from prismprune.demo.scenes import Scene, Thing, draw_scene, draw_written_scene
from prismprune.demo.start import closed_form_start, picture_array, teach_characters
from prismprune.demo.subsets import draw, shown

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from peft import PeftModel

WORD_NORM = 3.2  # mean norm of SmolLM2's word embeddings: targets of the start are scaled to it


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides the outcome. Steps count optimizer steps over both stages."""

    seed: int = 20261122
    steps: int = 1050
    small_steps: int = 250
    """First steps, at `small_size`: the same world at a quarter of the tokens."""
    small_size: int = 168
    size: int = 336
    pictures: int = 1
    questions: int = 16
    descriptions: int = 2
    """Objects of a scene to describe one by one, besides all of them in order; -1: nothing is described."""
    clip_share: float = 0.12
    clip_questions: int = 8
    easy_vqa_share: float = 0.12
    written_share: float = 0.0
    """Own scenes in which every object that can carries a character."""
    all_tokens_share: float = 0.1
    least_tokens: int = 40
    most_tokens: int = 300
    rank: int = 24
    adapter_rate: float = 5e-4
    projector_rate: float = 1e-4
    warm_up: int = 40
    final_rate: float = 0.05
    character_scenes: int = 0
    """Scenes from which the projector is taught to say characters before the first step."""
    lesson_weights: dict[str, float] = field(default_factory=lambda: dict(LESSON_WEIGHTS))
    """How often each kind of question is asked, 1 for a kind that is not named."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Subjects of one step: pixels [B * frames, 3, S, S], the questions of each, frames a subject.

    `shown` [B * frames, N] says which object each patch shows, 0 for none (easy-VQA does not tell).
    """

    pixels: Tensor
    shown: Tensor
    questions: list[list[Question]]
    frames: int


class Stream(IterableDataset[Batch]):
    """Draws batches without end; step i is the same whoever draws it."""

    def __init__(self, recipe: Recipe, first: int) -> None:
        self.recipe, self.first = recipe, first
        self.easy_vqa = EasyVQA("train")

    def __iter__(self) -> Iterator[Batch]:
        worker = torch.utils.data.get_worker_info()
        offset, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        for step in range(self.first + offset, self.recipe.steps, stride):
            yield self.draw(step)

    def draw(self, step: int) -> Batch:
        rng = random.Random(self.recipe.seed * 1_000_003 + step)
        return self._clips(rng) if rng.random() < self.recipe.clip_share else self._pictures(rng, step)

    def _clips(self, rng: random.Random) -> Batch:
        clip = draw_clip(rng)
        pixels = [torch.from_numpy(picture_array(frame, VIDEO_IMAGE_SIZE)) for frame in clip.frames]
        asked = clip_questions(rng, clip, self.recipe.clip_questions, TRAINED)
        if self.recipe.descriptions >= 0:
            asked.append(clip_description(rng, clip))
        numbers = [shown(cast, VIDEO_IMAGE_SIZE // PATCH_SIZE) for cast in clip.casts]
        return Batch(torch.stack(pixels), torch.stack(numbers), [asked], FRAMES)

    def _pictures(self, rng: random.Random, step: int) -> Batch:
        size = self.recipe.small_size if step < self.recipe.small_steps else self.recipe.size
        pixels, numbers, questions = [], [], []
        for _ in range(self.recipe.pictures):
            if rng.random() < self.recipe.easy_vqa_share:
                image, asked = self.easy_vqa.draw(rng, self.recipe.questions)
                things: tuple[Thing, ...] = ()
            else:
                written = self.recipe.written_share and rng.random() < self.recipe.written_share
                scene = draw_written_scene(rng) if written else draw_scene(rng)
                image, things, asked = scene.image, scene.things, self._lessons(rng, scene)
            pixels.append(torch.from_numpy(picture_array(image, size)))
            numbers.append(shown(things, size // PATCH_SIZE))
            questions.append(asked)
        return Batch(torch.stack(pixels), torch.stack(numbers), questions, 1)

    def _lessons(self, rng: random.Random, scene: Scene) -> list[Question]:
        asked = scene_questions(rng, scene, self.recipe.questions, TRAINED, self.recipe.lesson_weights)
        if self.recipe.descriptions >= 0:
            asked += scene_descriptions(rng, scene, self.recipe.descriptions)
        return asked


class Trainer:
    """Holds the frozen parts, the trained ones and the optimizer; one `step` a batch."""

    def __init__(self, recipe: Recipe) -> None:
        from peft import LoraConfig, get_peft_model  # noqa: PLC0415 (training only)

        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        language, self.tokenizer = language_part()
        words: Any = language.get_input_embeddings()
        self.embeddings: Tensor = words.weight.detach()
        self.head = language.lm_head.weight.detach()
        self.model: Any = build_model(vision_tower(), language, self.tokenizer)
        self.tower: Any = self.model.model.vision_tower.requires_grad_(requires_grad=False)
        self.layers = list(self.tower.encoder.layer)[:VISION_LAYER]
        self.projector = self.model.model.multi_modal_projector
        config = LoraConfig(
            r=recipe.rank, lora_alpha=2 * recipe.rank, target_modules="all-linear", bias="none"
        )
        self.language: PeftModel = get_peft_model(self.model.model.language_model, config)
        self.packer = Packer(self.tokenizer)
        adapter = [p for p in self.language.parameters() if p.requires_grad]
        self.trained = [*adapter, *self.projector.parameters()]
        groups = [{"params": adapter}, {"params": list(self.projector.parameters())}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0)
        self.done = 0

    def _rate(self, step: int) -> float:
        """Linear warm-up, then a cosine down to `final_rate` of the peak."""
        recipe = self.recipe
        if step < recipe.warm_up:
            return (step + 1) / recipe.warm_up
        way = (step - recipe.warm_up) / max(recipe.steps - recipe.warm_up, 1)
        return recipe.final_rate + (1 - recipe.final_rate) * 0.5 * (1 + math.cos(math.pi * min(way, 1.0)))

    def start(self) -> float:
        """Solve for the projector's start; returns how much of the targets it explains."""
        sizes = (self.recipe.small_size, self.recipe.size)
        return closed_form_start(self.projector, self._encode_images, self._embed, sizes, self.recipe.seed)

    def teach_characters(self) -> float:
        """Solve for what is written on objects; returns how much of it the projector then says."""
        recipe = self.recipe
        return teach_characters(
            self.projector,
            self._encode_images,
            self._embed,
            recipe.size,
            scenes=recipe.character_scenes,
            seed=recipe.seed,
        )

    def _encode_images(self, images: list[Any], size: int) -> Tensor:
        return self.encode(torch.stack([torch.from_numpy(picture_array(image, size)) for image in images]))

    def _embed(self, word: str) -> Tensor:
        ids = self.tokenizer(word, add_special_tokens=False).input_ids
        vector: Tensor = self.embeddings[ids].sum(0)
        return nn.functional.normalize(vector, dim=0) * WORD_NORM

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Patch features [B, N, d] of pixels [B, 3, S, S], of the layer that enters the projector."""
        hidden = self.tower.embeddings(pixels)
        for layer in self.layers:
            hidden = layer(hidden)
        patches: Tensor = hidden[:, 1:]
        return patches

    def step(self, batch: Batch, step: int) -> float:
        """One optimizer step; returns the mean loss over answer tokens."""
        rng = torch.Generator().manual_seed(self.recipe.seed + step)
        features = self.encode(batch.pixels)
        kept = self._kept(features, batch, rng)
        visual = self.projector(kept)
        pack = self.packer.pack(batch.questions, [kept.shape[1]] * batch.frames)
        loss = self.loss(pack, visual)
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        for group, peak in zip(
            self.optimizer.param_groups, (self.recipe.adapter_rate, self.recipe.projector_rate), strict=True
        ):
            group["lr"] = peak * self._rate(step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done = step + 1
        return float(loss.detach())

    def _kept(self, features: Tensor, batch: Batch, rng: torch.Generator) -> Tensor:
        """The features [B, K, d] that this step shows."""
        count = self._tokens(rng, batch, features.shape[1])
        if count == features.shape[1]:
            return features
        indices = draw(batch.shown, count, rng)
        return features.gather(1, indices[:, :, None].expand(-1, -1, features.shape[2]))

    def _tokens(self, rng: torch.Generator, batch: Batch, available: int) -> int:
        """How many tokens an image of this batch shows: all, or log-uniform between the recipe's bounds."""
        draw, share = map(float, torch.rand(2, generator=rng))
        if batch.frames > 1:
            return int(16 * 4 ** (share**2))
        if draw < self.recipe.all_tokens_share:
            return available
        low, high = self.recipe.least_tokens, min(self.recipe.most_tokens, available)
        return int(low * (high / low) ** share)

    def loss(self, pack: Pack, visual: Tensor) -> Tensor:
        """Cross-entropy over the answers' tokens; logits are computed for those alone."""
        hidden = hidden_states(self.language, self.embeddings, pack, visual)
        asked = pack.labels != IGNORED
        return nn.functional.cross_entropy(hidden[asked] @ self.head.T, pack.labels[asked])

    def save(self, folder: Path) -> None:
        """Write what is trained and what resuming needs."""
        folder.mkdir(parents=True, exist_ok=True)
        _save_weights(folder, self.projector, self.language)
        state = {"optimizer": self.optimizer.state_dict(), "done": self.done}
        torch.save(state, folder / "resume.pt.new")
        (folder / "resume.pt.new").replace(folder / "resume.pt")

    def load(self, folder: Path) -> None:
        """Take over trained weights, those of `save` or those that the project ships."""
        from peft import set_peft_model_state_dict  # noqa: PLC0415

        self.projector.load_state_dict(load_file(folder / "projector.safetensors"))
        set_peft_model_state_dict(self.language, load_file(folder / "adapter_model.safetensors"))

    def resume(self, folder: Path) -> None:
        """Go on where `save` left off."""
        self.load(folder)
        state = torch.load(folder / "resume.pt", weights_only=True)
        self.optimizer.load_state_dict(state["optimizer"])
        self.done = state["done"]


def _save_weights(folder: Path, projector: nn.Module, language: PeftModel) -> None:
    """Projector and adapter as safetensors, the adapter in peft's own layout."""
    from peft import get_peft_model_state_dict  # noqa: PLC0415

    folder.mkdir(parents=True, exist_ok=True)
    adapter = get_peft_model_state_dict(language)
    for name, state in (("projector", projector.state_dict()), ("adapter_model", adapter)):
        save_file({key: value.contiguous() for key, value in state.items()}, folder / f"{name}.safetensors")
    language.peft_config["default"].save_pretrained(str(folder))


def train(
    folder: Path, recipe: Recipe, *, begin_from: Path | None = None, workers: int = 1, save_every: int = 50
) -> Iterator[dict[str, float]]:
    """Train into `folder`, resuming what lies there; yields a record every ten steps.

    A fresh run begins from the weights in `begin_from`, with a new optimizer, or from the closed-form start.
    """
    trainer = Trainer(recipe)
    if (folder / "resume.pt").exists():
        trainer.resume(folder)
    elif begin_from is not None:
        trainer.load(begin_from)
    else:
        yield {"step": 0, "explained": trainer.start()}
    if not trainer.done and recipe.character_scenes:
        yield {"step": 0, "characters_explained": trainer.teach_characters()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n")
    loader = DataLoader(
        Stream(recipe, trainer.done),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
    )
    began, losses, asked = time.monotonic(), [], 0
    for step, batch in enumerate(loader, start=trainer.done):
        losses.append(trainer.step(batch, step))
        asked += sum(map(len, batch.questions))
        if (step + 1) % 10 == 0:
            seconds = time.monotonic() - began
            yield {"step": step + 1, "loss": sum(losses[-10:]) / 10, "questions": asked, "seconds": seconds}
        if (step + 1) % save_every == 0:
            trainer.save(folder)
    trainer.save(folder)


def ship(trained: Path, target: Path) -> None:
    """Write the trained weights as the project carries them: 16 bits, without what only resuming needs."""
    target.mkdir(parents=True, exist_ok=True)
    for name in ("projector.safetensors", "adapter_model.safetensors"):
        state = load_file(trained / name)
        save_file({key: value.to(torch.float16) for key, value in state.items()}, target / name)
    config = json.loads((trained / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = None  # a path of the machine that trained
    config["target_modules"].sort()  # a set's order, another at each run
    (target / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (target / "recipe.json").write_text((trained / "recipe.json").read_text())
