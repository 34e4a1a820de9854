"""Work that CUDA replays: one launch in place of hundreds of kernels, one after the other.

Pruned prompts, decoding steps and the tower on a picture are little work in many kernels, and a fast device
waits for who launches them. What is recorded has fixed addresses and shapes, so sizes are rounded up, and
masks hide what is not there. transformers' own way, `StaticCache` with `torch.compile`, holds one batch from
its prefill to its end; here rows come and go.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch

from prismprune.replay.prompts import PromptReplay
from prismprune.replay.recording import Record, recorded
from prismprune.replay.steps import StepReplay
from prismprune.replay.towers import TowerReplay

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from prismprune.batches import Batch

__all__ = ["GraphBytes", "Replay", "TowerReplay", "granted", "replay_of", "tower_replay_of"]

GraphBytes = int | Literal["auto"]
SHARE = 4
"""By itself, recorded work may take one part in so many of the memory that is free: a batch that moves into
its place is held twice, and what is encoded beside needs room as well."""
PROMPTS = 8
"""Prompts may take one part in so many of the memory: each is filled, copied and gone before the next."""


class Replay:
    """What of a language model's work is recorded as it comes, for batches one at a time.

    max_bytes: how much keys and values may take in the places that recordings are tied to; what needs more is
    done as ever. record: see `recording.recorded`. One thread at a time may use it, and within
    `torch.inference_mode`, as `Running` does.
    """

    def __init__(self, model: Any, max_bytes: int, record: Record = recorded) -> None:
        self.prompts = PromptReplay(model, max_bytes // PROMPTS, record)
        self.steps = StepReplay(model, max_bytes - max_bytes // PROMPTS, record)

    @property
    def bytes(self) -> int:
        """What the places for keys and values take."""
        return self.prompts.bytes + self.steps.bytes

    def step(self, batch: Batch, tokens: list[int]) -> Tensor | None:
        """As `Batch.step`; see `StepReplay.step`."""
        return self.steps.step(batch, tokens)

    def extend(
        self, batch: Batch, ids: Tensor, mask: Tensor, positions: Tensor, visual_inputs: Mapping[str, Any]
    ) -> Tensor | None:
        """As `Batch.extend`; see `PromptReplay.extend`."""
        return self.prompts.extend(batch, ids, mask, positions, visual_inputs)

    def release(self, batch: Batch) -> None:
        """Before anything but a step: see `StepReplay.release`."""
        self.steps.release(batch)

    def clear(self) -> None:
        """Give up all memory; what is wanted again is recorded again."""
        self.prompts.clear()
        self.steps.clear()


def granted(wanted: GraphBytes, device: torch.device) -> int:
    """Bytes for recorded work of a model that is on its device already; none where that is not CUDA."""
    if device.type != "cuda":
        return 0
    if wanted == "auto":
        free, _ = torch.cuda.mem_get_info(device)
        return free // SHARE
    return wanted


def replay_of(model: Any, quantization: str | None, max_bytes: int) -> Replay | None:
    """For a language model on CUDA that can be recorded, if it may take memory; see `Loaded.quantization`.

    LLM.int8 looks for outliers in what it multiplies; a layer with a sliding window wants a mask of its own.
    """
    text = model.config.get_text_config()
    windowed = getattr(text, "use_sliding_window", True) and getattr(text, "sliding_window", None) is not None
    if model.device.type != "cuda" or not max_bytes or windowed or (quantization or "").startswith("int8"):
        return None
    return Replay(model, max_bytes)


def tower_replay_of(model: Any, max_bytes: int) -> TowerReplay | None:
    """For the towers of a model on CUDA, where recordings are granted memory."""
    return TowerReplay() if model.device.type == "cuda" and max_bytes else None
