"""The demo's honest results: accuracy by method and budget on scenes, clips and easy-VQA that it never saw.

Phrasings are the held-out ones. An answer counts when it is exactly the true one. Questions about one picture
are packed into one pass; whether each greedy token is right given the right ones before it is what generating
them one by one would show.
"""

from __future__ import annotations

import random
from functools import partial
from typing import TYPE_CHECKING

import torch

from prismprune.demo import CHAT_TEMPLATE
from prismprune.demo.clips import draw_clip
from prismprune.demo.easyvqa import EasyVQA
from prismprune.demo.packing import IGNORED, Packer, hidden_states
from prismprune.demo.questions import HELD_OUT, clip_questions, scene_questions
from prismprune.demo.scenes import draw_scene
from prismprune.errors import InvalidOptionError
from prismprune.evaluation.compare import Marks, compare
from prismprune.evaluation.report import Report, Setting
from prismprune.evaluation.subjects import Question, Subject
from prismprune.media import Clip, Picture, as_picture

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from prismprune.demo.clips import ClipScene
    from prismprune.encoding import EncodedMedia
    from prismprune.evaluation.compare import Marker
    from prismprune.vlm import PrunedVLM

__all__ = ["CLIPS", "EASY_VQA_TEST", "SCENES", "SETTINGS", "Report", "Setting", "evaluate", "subjects"]

SEED = 9_000_000  # far from any training seed
SCENES, CLIPS, EASY_VQA_TEST = "scenes", "clips", "easy-vqa"
SETTINGS: dict[str, tuple[Setting, ...]] = {
    SCENES: (
        ("none", None),
        *(("prism", k) for k in (128, 64, 32)),
        *((method, k) for method in ("saliency", "uniform", "random", "fps") for k in (64, 32)),
    ),
    EASY_VQA_TEST: (("none", None), ("prism", 64), ("prism", 32), ("random", 64), ("random", 32)),
    CLIPS: (
        ("none", None),
        *((method, k) for method in ("prism", "random") for k in (512, 256, 128, 64)),
    ),
}


def subjects(suite: str, number: int) -> Iterator[Subject]:
    """`number` pictures or clips of `suite` with their questions, the same every time."""
    if suite == EASY_VQA_TEST:
        data = EasyVQA("test")
        for picture in data.pictures[:number]:
            asked = tuple(data.questions[picture])
            yield Subject(f"{suite}/{picture}", asked, partial(_easy_vqa, data, picture))
        return
    for index in range(number):
        rng = random.Random(SEED + index)
        name = f"{suite}/{SEED + index}"
        if suite == SCENES:
            scene = draw_scene(rng)
            asked = tuple(scene_questions(rng, scene, 10, HELD_OUT))
            yield Subject(name, asked, partial(as_picture, scene.image))
        else:
            clip = draw_clip(rng)
            yield Subject(name, tuple(clip_questions(rng, clip, 8, HELD_OUT)), partial(_as_clip, clip))


def _easy_vqa(data: EasyVQA, picture: int) -> Picture:
    return as_picture(data.image(picture))


def _as_clip(clip: ClipScene) -> Clip:
    times = tuple(float(i) for i in range(len(clip.frames)))
    return Clip(clip.frames, times, clip.frames[0].size, decode_ms=0.0)


def evaluate(
    vlm: PrunedVLM,
    suite: str,
    number: int,
    settings: Sequence[Setting] | None = None,
    *,
    results: Path | None = None,
) -> Iterator[Report]:
    """Yield the growing report after each picture or clip; the last one is whole. See `compare`."""
    chosen = settings or SETTINGS[suite]
    yield from compare(vlm, suite, subjects(suite, number), chosen, marker=packed(vlm), results=results)


def is_demo(vlm: PrunedVLM) -> bool:
    """Whether the model is prompted as the demo is, so that its questions can be packed."""
    return bool(vlm.processor.chat_template == CHAT_TEMPLATE)


def packed(vlm: PrunedVLM) -> Marker:
    """Mark all questions about a picture in one pass of the language model, over one prefix.

    Raises `InvalidOptionError` for a model that is not prompted as the demo is.
    """
    if not is_demo(vlm):
        raise InvalidOptionError(f"{vlm.name} is no demo model: `prismprune compare` asks any other.")
    packer = Packer(vlm.processor.tokenizer)

    @torch.inference_mode()
    def marker(questions: Sequence[Question], encoded: EncodedMedia) -> Marks:
        parts = [visual.features for visual in encoded.visuals]
        pack = packer.pack([questions], [len(part) for part in parts])
        model = vlm.model
        hidden = hidden_states(
            model.model.language_model, model.get_input_embeddings().weight, pack, torch.cat(parts)
        )
        asked = pack.labels[0] != IGNORED
        hits = model.lm_head(hidden[0, asked]).argmax(-1).cpu() == pack.labels[0, asked]
        block = pack.block[0, asked]
        return Marks([bool(hits[block == number].all()) for number in range(len(questions))])

    return marker
