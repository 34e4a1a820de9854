"""One answer, token by token: how its tokens are chosen, when it ends, and the text that it gives on its way.

transformers' `generate` takes one configuration a batch and cannot drop a row; its warpers do the work here,
and `prismprune.decoding` runs the model over many rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from prismprune.errors import InvalidOptionError

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from torch import Tensor

    from prismprune.families.base import Visual
    from prismprune.results import FinishReason

COLDEST = 1e-5
"""Below this temperature logits overflow, and nothing but the likeliest token is ever drawn: greedy."""
UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a character decodes to while some of its bytes are still to come."""


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
        if self.max_new_tokens < 1:
            raise InvalidOptionError("max_new_tokens is at least 1.")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InvalidOptionError("temperature is a number of at least 0.")
        if not 0 < self.top_p <= 1:
            raise InvalidOptionError("top_p is a number above 0 and at most 1.")
        if not all(self.stop):
            raise InvalidOptionError("A stop string is not empty.")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise InvalidOptionError("seed is a whole number of at most 64 bits.")


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


class TextStream:
    """Turns a row's growing token ids into text that is given out once it can no longer change.

    What is held back: the start of a character whose bytes are not all there, what may become a stop string,
    and white space that may turn out to be the last. Text is given without white space at either end.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self.given = ""
        self.stopped = False

    def push(self, token_ids: Sequence[int]) -> str:
        """The newly settled text of all of a row's tokens so far; sets `stopped` at a stop string."""
        text = self._decode(token_ids)
        ends = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        self.stopped = bool(ends)
        return self._give(text[: min(ends)] if ends else self._settled(text))

    def end(self, token_ids: Sequence[int]) -> str:
        """What was held back, as no more tokens come."""
        return self._give(self._decode(token_ids))

    def _decode(self, token_ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(
            token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def _settled(self, text: str) -> str:
        text = text.rstrip(UNFINISHED)
        starts = (stop[:length] for stop in self._stop for length in range(1, len(stop)))
        held = max((len(start) for start in starts if text.endswith(start)), default=0)
        return text[: len(text) - held]

    def _give(self, text: str) -> str:
        new = text.strip()[len(self.given) :]
        self.given += new
        return new


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
    """One answer in the making."""

    def __init__(self, tokenizer: Any, options: GenerationOptions, prefilled: Prefilled) -> None:
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._stream = TextStream(tokenizer, options.stop)
        self._choose = _sampler(options)
        self._max_new_tokens = options.max_new_tokens
        self._prefilled = prefilled
        self._ended_ms = prefilled.ended_ms
        self._taken = 0

    def take(self, scores: Tensor, likeliest: int, end_ids: frozenset[int], now_ms: float) -> str:
        """Choose the next token by its scores [vocabulary]; returns the text that is settled by it."""
        self._taken += 1
        self._ended_ms = now_ms
        token = self._choose(scores, likeliest)
        if token in end_ids:
            self.finish_reason = "stop"
            return self._stream.end(self.token_ids)
        self.token_ids.append(token)
        text = self._stream.push(self.token_ids)
        if self._stream.stopped:
            self.finish_reason = "stop"
        elif len(self.token_ids) == self._max_new_tokens:
            self.finish_reason = "length"
            text += self._stream.end(self.token_ids)
        return text

    def cancel(self) -> None:
        """End it as it stands; it leaves its batch with the next step."""
        self.finish_reason = "canceled"
        self._stream.end(self.token_ids)

    def outcome(self) -> Generated:
        """What came of it; only once it has ended."""
        if self.finish_reason is None:
            raise RuntimeError("a row was left before its end")
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


def _sampler(options: GenerationOptions) -> Callable[[Tensor, int], int]:
    """Chooses a token by its scores [vocabulary] and the likeliest one's id; each row has its own dice."""
    if options.temperature < COLDEST:
        return lambda _scores, likeliest: likeliest
    dice = torch.Generator()  # on the CPU: the same seed draws the same numbers for every device
    dice.manual_seed(dice.seed() if options.seed is None else options.seed)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(options.temperature))])
    if options.top_p < 1:
        warpers.append(TopPLogitsWarper(options.top_p))

    no_history: Any = None  # neither warper looks at the tokens before

    def draw(scores: Tensor, _likeliest: int) -> int:
        warped = warpers(no_history, scores[None].float().cpu())
        return int(torch.multinomial(warped.softmax(-1), 1, generator=dice))

    return draw
