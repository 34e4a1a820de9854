"""One adapter a model family, found by the config's `model_type`. A new one is a file and a line here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prismprune.errors import UnknownModelError
from prismprune.families.llava import LlavaFamily
from prismprune.families.llava_next import LlavaNextFamily
from prismprune.families.qwen2_5_vl import Qwen25VLFamily
from prismprune.families.video_llava import VideoLlavaFamily

if TYPE_CHECKING:
    from prismprune.families.base import Family

__all__ = ["FAMILIES", "family_of"]

FAMILIES: dict[str, type[Family]] = {
    family.name: family for family in (LlavaFamily, LlavaNextFamily, VideoLlavaFamily, Qwen25VLFamily)
}
"""`model_type` of a transformers config to its adapter."""


def family_of(model_type: str) -> type[Family]:
    """The adapter for that `model_type`; raises `UnknownModelError`, whose message lists the known ones."""
    if model_type not in FAMILIES:
        raise UnknownModelError(
            f"No adapter for models of type {model_type!r}; known families are {', '.join(sorted(FAMILIES))}."
        )
    return FAMILIES[model_type]
