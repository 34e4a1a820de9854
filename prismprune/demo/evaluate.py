"""The demo's honest results: accuracy by method and budget on scenes, clips and easy-VQA that it never saw.

Phrasings are the held-out ones. An answer counts when it is exactly the true one. Questions about one picture
are packed into one pass; whether each greedy token is right given the right ones before it is what generating
them one by one would show.
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from prismprune.budget import TokenBudget
from prismprune.demo.clips import draw_clip
from prismprune.demo.easyvqa import EasyVQA
from prismprune.demo.packing import IGNORED, Packer, hidden_states
from prismprune.demo.questions import HELD_OUT, Question, clip_questions, scene_questions
from prismprune.demo.scenes import draw_scene
from prismprune.media import Clip, Picture, as_picture
from prismprune.selection import Scores, selector
from prismprune.selection.base import take

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from prismprune.families.base import Pixels, Reading
    from prismprune.vlm import PrunedVLM

SEED = 9_000_000  # far from any training seed
SCENES, CLIPS, EASY_VQA_TEST = "scenes", "clips", "easy-vqa"
Setting = tuple[str, int | None]
"""(method, tokens kept of an image or clip); None keeps all."""
SETTINGS: dict[str, tuple[Setting, ...]] = {
    SCENES: (
        ("none", None),
        *(("prism", k) for k in (128, 64, 32)),
        *((method, k) for method in ("saliency", "uniform", "random", "fps") for k in (64, 32)),
    ),
    EASY_VQA_TEST: (("none", None), ("prism", 64), ("prism", 32), ("random", 64), ("random", 32)),
    CLIPS: (("none", None), ("prism", 512), ("prism", 256), ("random", 512), ("random", 256)),
}


@dataclass(slots=True)
class Subject:
    media: Picture | Clip
    questions: list[Question]


@dataclass(slots=True)
class Tally:
    """Right answers of one setting, by kind of question."""

    right: Counter[str] = field(default_factory=Counter)
    asked: Counter[str] = field(default_factory=Counter)

    def add(self, kind: str, right: bool) -> None:
        self.asked[kind] += 1
        self.right[kind] += right

    @property
    def questions(self) -> int:
        return self.asked.total()

    @property
    def accuracy(self) -> float:
        return float(self.right.total() / self.questions)

    @property
    def margin(self) -> float:
        """Half of the 95 % interval (normal approximation)."""
        return 1.96 * math.sqrt(self.accuracy * (1 - self.accuracy) / self.questions)


@dataclass(slots=True)
class Report:
    """Tallies by setting; `majority` is the accuracy of always giving a kind's commonest answer."""

    suite: str
    pictures: int = 0
    tallies: dict[Setting, Tally] = field(default_factory=lambda: defaultdict(Tally))
    answers: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))

    @property
    def majority(self) -> float:
        commonest = sum(counter.most_common(1)[0][1] for counter in self.answers.values())
        return commonest / sum(counter.total() for counter in self.answers.values())


def subjects(suite: str, number: int) -> Iterator[Subject]:
    """`number` pictures or clips of `suite` with their questions, the same every time."""
    if suite == EASY_VQA_TEST:
        data = EasyVQA("test")
        for picture in data.pictures[:number]:
            yield Subject(as_picture(data.image(picture)), data.questions[picture])
        return
    for index in range(number):
        rng = random.Random(SEED + index)
        if suite == SCENES:
            scene = draw_scene(rng)
            yield Subject(as_picture(scene.image), scene_questions(rng, scene, 10, HELD_OUT))
        else:
            clip = draw_clip(rng)
            times = tuple(float(i) for i in range(len(clip.frames)))
            media = Clip(clip.frames, times, clip.frames[0].size, decode_ms=0.0)
            yield Subject(media, clip_questions(rng, clip, 8, HELD_OUT))


def evaluate(
    vlm: PrunedVLM, suite: str, number: int, settings: Sequence[Setting] | None = None
) -> Iterator[Report]:
    """Yield the growing report after each picture or clip; the last one is whole."""
    packer = Packer(vlm.processor.tokenizer)
    report = Report(suite)
    for subject in subjects(suite, number):
        for question in subject.questions:
            report.answers[_baseline_key(question)][question.answer] += 1
        for setting, right in _marks(vlm, packer, subject, settings or SETTINGS[suite]):
            for question, mark in zip(subject.questions, right, strict=True):
                report.tallies[setting].add(question.kind, mark)
        report.pictures += 1
        yield report


def _baseline_key(question: Question) -> str:
    """easy-VQA's questions are all of one kind here; its baseline goes by the wording."""
    return question.text if question.kind == "easy_vqa" else question.kind


@torch.inference_mode()
def _marks(
    vlm: PrunedVLM, packer: Packer, subject: Subject, settings: Sequence[Setting]
) -> Iterator[tuple[Setting, list[bool]]]:
    family = vlm._family  # noqa: SLF001 (one reading of the tower serves all settings)
    (pixels,) = family.preprocess(family.views([subject.media]))
    reading = family.read(pixels)
    for setting in settings:
        parts = [family.project(tokens) for tokens in _kept(reading, pixels, setting)]
        yield setting, _right(vlm, packer, subject.questions, parts)


def _kept(reading: Reading, pixels: Pixels, setting: Setting) -> list[Tensor]:
    """Visual tokens [K, d] of each image or frame that stay under a method and budget."""
    method, budget = setting
    patches = reading.patches
    if budget is None:
        return list(patches)
    shares = TokenBudget(tokens=budget).split([patches.shape[1]] * len(patches))
    attention, choose = reading.attention(), selector(method)
    kept = []
    for row, share in enumerate(shares):
        one = slice(row, row + 1)
        chosen = choose(Scores(attention[one], patches[one], pixels.grid), share)
        kept.append(take(patches[one], chosen.indices)[0])
    return kept


def _right(
    vlm: PrunedVLM, packer: Packer, questions: Sequence[Question], parts: Sequence[Tensor]
) -> list[bool]:
    pack = packer.pack([questions], [len(part) for part in parts])
    model = vlm.model
    hidden = hidden_states(
        model.model.language_model, model.get_input_embeddings().weight, pack, torch.cat(list(parts))
    )
    asked = pack.labels[0] != IGNORED
    hits = model.lm_head(hidden[0, asked]).argmax(-1) == pack.labels[0, asked]
    block = pack.block[0, asked]
    return [bool(hits[block == number].all()) for number in range(len(questions))]
