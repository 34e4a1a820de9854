"""One answer, token by token: how its tokens are chosen, when it ends, and the text that it gives on its way.

transformers' `generate` takes one configuration a batch and cannot drop a row; `prismprune.decoding` runs the
model over many rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from prismprune.errors import InvalidOptionError, InvalidScoresError
from prismprune.kinds import is_number, is_whole
from prismprune.sampling import Dice
from prismprune.text_stream import TextStream

if TYPE_CHECKING:
    from collections.abc import Hashable

    from torch import Tensor

    from prismprune.families.base import Visual
    from prismprune.results import FinishReason
    from prismprune.text_stream import Spelling


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """How one answer is generated. `temperature` 0 is greedy; `seed` None draws anew each time.

    The answer ends before the first of the `stop` strings. Raises `InvalidOptionError` for a value out of its
    range.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    system: str | None = None

    def __post_init__(self) -> None:
        if not (is_whole(self.max_new_tokens) and self.max_new_tokens >= 1):
            raise InvalidOptionError("max_new_tokens is a whole number of at least 1.")
        if not (is_number(self.temperature) and 0 <= self.temperature < math.inf):
            raise InvalidOptionError("temperature is a number of at least 0.")
        if not (is_number(self.top_p) and 0 < self.top_p <= 1):
            raise InvalidOptionError("top_p is a number above 0 and at most 1.")
        if not _are_texts(self.stop):
            raise InvalidOptionError("stop is a tuple of strings that are not empty.")
        if self.seed is not None and not (is_whole(self.seed) and -(2**63) <= self.seed < 2**63):
            raise InvalidOptionError("seed is a whole number of at most 64 bits.")
        for name, value in (("max_new_tokens", self.max_new_tokens), ("seed", self.seed)):
            if value is not None:
                object.__setattr__(self, name, int(value))  # numpy's are whole numbers, too
        for text in self.stop if self.system is None else (self.system, *self.stop):
            check_text(text, "system and stop strings each")


def check_text(value: object, what: str) -> None:
    """Raise `InvalidOptionError` for what is no text, or has half a character, which no tokenizer takes."""
    if not isinstance(value, str):
        raise InvalidOptionError(f"{what} is a text.")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise InvalidOptionError(f"{what} is a text without half a character (a lone surrogate).")


def _are_texts(value: object) -> bool:
    """A string alone is none: it would be taken for its letters."""
    return isinstance(value, (tuple, list)) and all(isinstance(text, str) and text for text in value)


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids [T] with one placeholder a visual token, and what the placeholders stand for.

    position_ids: [3, T] for a model with rotary positions in three rows; None: 0 to T - 1. next_position:
    that of the first generated token; None: T. media_key: names all that its visuals were made from, for a
    cache of keys and values; None: they are not cached.
    """

    token_ids: Tensor
    visuals: tuple[Visual, ...]
    position_ids: Tensor | None = None
    next_position: int | None = None
    media_key: Hashable | None = None

    @property
    def positions(self) -> Tensor:
        """Of its tokens: [T], or [3, T]."""
        return torch.arange(len(self.token_ids)) if self.position_ids is None else self.position_ids

    @property
    def following(self) -> int:
        """The position of the first generated token."""
        return len(self.token_ids) if self.next_position is None else self.next_position

    def beginning(self, length: int) -> Prompt:
        """The first `length` tokens, with all of the visuals."""
        return Prompt(self.token_ids[:length], self.visuals, self.positions[..., :length])


@dataclass(frozen=True, slots=True)
class Generated:
    """One row's outcome. `token_ids` are without the end token, but with those of a stop string.

    `kv_cache_bytes` is what this row alone holds of the cache at its end, without padding.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    kv_cache_bytes: int
    prefill_ms: float
    generate_ms: float


@dataclass(frozen=True, slots=True)
class Prefilled:
    """What is known of a row before its first token.

    tokens: of its prompt. token_bytes: what one token takes in the cache. took_ms: the prefill, which ended
    at `ended_ms` on the batch's clock.
    """

    tokens: int
    token_bytes: int
    took_ms: float
    ended_ms: float


class Row:
    """One answer in the making. dice: what its tokens are drawn with, if they are."""

    def __init__(self, spelling: Spelling, options: GenerationOptions, prefilled: Prefilled) -> None:
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | Literal["failed"] | None = None
        self.dice = Dice.of(options)
        self._stream = TextStream(spelling, options.stop)
        self._max_new_tokens = options.max_new_tokens
        self._prefilled = prefilled
        self._ended_ms = prefilled.ended_ms
        self._taken = 0

    def take(self, token: int | None, end_ids: frozenset[int], now_ms: float) -> str:
        """Go on with the next token; returns the text that is settled by it. None ends it as "failed"."""
        self._taken += 1
        self._ended_ms = now_ms
        if token is None:
            self.finish_reason = "failed"
            return ""
        if token in end_ids:
            self.finish_reason = "stop"
            return self._stream.end(self.token_ids)
        self.token_ids.append(token)
        text = self._stream.push(self.token_ids)
        if not self._stream.stopped and len(self.token_ids) == self._max_new_tokens:
            self.finish_reason = "length"
            text += self._stream.end(self.token_ids)
        if self._stream.stopped:
            self.finish_reason = "stop"
        return text

    def cancel(self) -> None:
        """End it as it stands; it leaves its batch with the next step."""
        self.finish_reason = "canceled"
        self._stream.end(self.token_ids)

    def outcome(self) -> Generated:
        """What came of it; only once it has ended. Raises `InvalidScoresError` if it failed."""
        if self.finish_reason is None:
            raise RuntimeError("a row was left before its end")
        if self.finish_reason == "failed":
            raise InvalidScoresError("The model's scores for the next token are no finite numbers.")
        fed = max(0, self._taken - 1)  # the last token chosen is never given back to the model
        return Generated(
            text=self._stream.given,
            token_ids=tuple(self.token_ids),
            finish_reason=self.finish_reason,
            prompt_tokens=self._prefilled.tokens,
            kv_cache_bytes=(self._prefilled.tokens + fed) * self._prefilled.token_bytes,
            prefill_ms=self._prefilled.took_ms,
            generate_ms=self._ended_ms - self._prefilled.ended_ms,
        )
