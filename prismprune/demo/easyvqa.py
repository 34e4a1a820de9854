"""easy-VQA's pictures and questions, read straight from the data folder of its package."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import TYPE_CHECKING, Literal

from PIL import Image

from prismprune.demo.parts import EASY_VQA, fetch
from prismprune.demo.questions import Question

if TYPE_CHECKING:
    import random


class EasyVQA:
    """One split: 4,000 train or 1,000 test pictures of 64 x 64 pixels with their questions."""

    def __init__(self, split: Literal["train", "test"]) -> None:
        self._folder = fetch(EASY_VQA) / split
        rows = json.loads((self._folder / "questions.json").read_text())
        self.questions: dict[int, list[Question]] = defaultdict(list)
        for text, answer, picture in rows:
            self.questions[picture].append(Question("easy_vqa", text, answer))
        self.pictures = sorted(self.questions)

    def image(self, picture: int) -> Image.Image:
        with Image.open(self._folder / "images" / f"{picture}.png") as image:
            return image.convert("RGB")

    def draw(self, rng: random.Random, number: int) -> tuple[Image.Image, list[Question]]:
        """A random picture and up to `number` of its questions."""
        picture = rng.choice(self.pictures)
        asked = self.questions[picture]
        return self.image(picture), rng.sample(asked, min(number, len(asked)))
