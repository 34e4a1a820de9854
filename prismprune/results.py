"""What an answer carries besides its text: what was kept, what it cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "canceled"]


@dataclass(frozen=True, slots=True)
class VisualTokens:
    """Visual tokens of one request, summed over its images, crops or frames.

    `salient` and `diverse` are None where the method does not tell them apart or nothing was pruned;
    `method` is then the method's name or "none". `newlines` counts layout tokens outside the budget.
    """

    original: int
    kept: int
    salient: int | None
    diverse: int | None
    budget: int | None
    method: str
    newlines: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """Milliseconds of each stage; a stage shared by a batch reports the batch's time."""

    decode_ms: float = 0.0
    preprocess_ms: float = 0.0
    vision_ms: float = 0.0
    select_ms: float = 0.0
    prefill_ms: float = 0.0
    generate_ms: float = 0.0
    time_to_first_token_ms: float = 0.0
    total_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Memory:
    """Device memory in bytes: allocated on CUDA, resident on CPU. `kv_cache_bytes` is this answer's own."""

    device: str
    peak_bytes: int
    kv_cache_bytes: int


@dataclass(frozen=True, slots=True)
class PartMap:
    """Kept tokens of one image, crop or frame, as raster indices into `grid` (rows, columns).

    `box` is (left, top, right, bottom) in pixels of the upright original. Where the method does not tell
    salient from diverse, both are None and `kept` lists the indices.
    """

    media: int
    crop: int | None
    frame: int | None
    time_s: float | None
    grid: tuple[int, int]
    box: tuple[int, int, int, int]
    salient: tuple[int, ...] | None
    diverse: tuple[int, ...] | None
    kept: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer. `token_ids` are the generated ids without the end token.

    cached_tokens: of its prompt, those whose encoding was not made for it but found ready.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    visual_tokens: VisualTokens
    timings: Timings
    memory: Memory
    warnings: tuple[str, ...] = ()
    token_map: tuple[PartMap, ...] = field(default=())
    cached_tokens: int = 0
