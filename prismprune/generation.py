"""Token by token over a batch whose rows each have their own length, sampling, stop strings and end.

transformers' `generate` takes one configuration a batch and cannot drop a row; its pieces (cache, warpers,
the models' `forward`) do the work here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from prismprune.errors import InvalidOptionError
from prismprune.meters import Stopwatch

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from torch import Tensor

    from prismprune.results import FinishReason

COLDEST = 1e-5
"""Below this temperature logits overflow, and nothing but the likeliest token is ever drawn: greedy."""
SIMILAR = 0.75
"""Prompts are prefilled together while the shortest has this share of the longest: padding is work, too."""
UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a character decodes to while some of its bytes are still to come."""

TokenEvent = tuple[int, str]
"""A row of the batch has a new token; the text that is settled by it, often none."""


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
    """Token ids [T] with one placeholder a visual token, and those tokens as embeddings [K, width] a view."""

    token_ids: Tensor
    features: tuple[Tensor, ...]


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


@dataclass(frozen=True)
class Decoder:
    """Generates with one model.

    end_ids: tokens that end an answer. visual_inputs: projected features, one [K, width] a placeholder, to
    arguments of the model's `forward`.
    """

    model: Any
    tokenizer: Any
    end_ids: frozenset[int]
    visual_inputs: Callable[[Sequence[Tensor]], dict[str, Any]]

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Prompt],
        options: Sequence[GenerationOptions],
        should_stop: Callable[[int], bool] | None = None,
    ) -> Generator[TokenEvent, None, list[Generated]]:
        """Answer all prompts in one batch, with an event a token; the generator's value are the outcomes.

        `should_stop(row)` is asked before each token of a row; True ends it as "canceled".
        """
        watch = Stopwatch(self.model.device)
        rows = live = [
            _Row(index, TextStream(self.tokenizer, own.stop), own) for index, own in enumerate(options)
        ]
        batch, logits = self._prefill(prompts)
        prefill_ms, token_bytes = watch.lap_ms(), batch.token_bytes
        fed, generate_ms = 0, 0.0
        while live:
            for row, scores, likeliest in zip(live, logits, logits.argmax(-1).tolist(), strict=True):
                canceled = should_stop is not None and should_stop(row.index)
                text = row.cancel() if canceled else row.take(scores, likeliest, self.end_ids)
                row.fed, row.generate_ms = fed, generate_ms
                yield row.index, text
            going = [place for place, row in enumerate(live) if row.finish_reason is None]
            if 0 < len(going) < len(live):
                batch.keep(going)
            live = [live[place] for place in going]
            if live:
                logits = batch.step(self.model, [row.token_ids[-1] for row in live])
                fed, generate_ms = fed + 1, generate_ms + watch.lap_ms()
        return [
            row.outcome(len(prompt.token_ids), token_bytes, prefill_ms)
            for row, prompt in zip(rows, prompts, strict=True)
        ]

    def _prefill(self, prompts: Sequence[Prompt]) -> tuple[_Batch, Tensor]:
        """Run the prompts through the model; logits [B, vocabulary] of each one's first token."""
        groups = similar_lengths([len(prompt.token_ids) for prompt in prompts])
        parts = [self._prefill_group([prompts[row] for row in group]) for group in groups]
        if len(parts) == 1:
            return parts[0]
        places = torch.tensor([row for group in groups for row in group]).argsort().tolist()
        batch = _joined([batch for batch, _ in parts])
        batch.keep(places)
        return batch, torch.cat([logits for _, logits in parts])[places]

    def _prefill_group(self, prompts: Sequence[Prompt]) -> tuple[_Batch, Tensor]:
        longest = max(len(prompt.token_ids) for prompt in prompts)
        # Any token serves as padding, as nothing attends to it, but for a placeholder, which would be filled.
        filler = int(prompts[0].token_ids[-1])
        ids = [pad(p.token_ids, (longest - len(p.token_ids), 0), value=filler) for p in prompts]
        mask = [pad(torch.ones_like(p.token_ids), (longest - len(p.token_ids), 0)) for p in prompts]
        batch = _Batch(DynamicCache(), torch.stack(mask).to(self.model.device))
        output = self.model(
            input_ids=torch.stack(ids).to(self.model.device),
            attention_mask=batch.mask,
            position_ids=(batch.mask.cumsum(-1) - 1).clamp(min=0),
            past_key_values=batch.cache,
            use_cache=True,
            logits_to_keep=1,
            **self.visual_inputs([features for prompt in prompts for features in prompt.features]),
        )
        return batch, output.logits[:, -1]


@dataclass(slots=True)
class _Batch:
    """Rows that decode together: their cache, and the mask [B, T] over it, 0 for padding on the left."""

    cache: DynamicCache
    mask: Tensor

    @property
    def token_bytes(self) -> int:
        """Bytes that one token of one row takes in the cache: 2 * layers * kv heads * head_dim * itemsize."""
        tensors: list[Tensor] = [tensor for layer in self.cache for tensor in layer[:2]]
        return sum(tensor.shape[1] * tensor.shape[3] * tensor.element_size() for tensor in tensors)

    def keep(self, rows: list[int]) -> None:
        """Drop all rows but these, and put them in this order."""
        places = torch.tensor(rows, device=self.mask.device)
        self.cache.batch_select_indices(places)
        self.mask = self.mask[places]

    def step(self, model: Any, tokens: list[int]) -> Tensor:
        """Feed one token a row; logits [B, vocabulary] of the next."""
        self.mask = pad(self.mask, (0, 1), value=1)
        output = model(
            input_ids=torch.tensor(tokens, device=self.mask.device)[:, None],
            attention_mask=self.mask,
            position_ids=self.mask.sum(-1, keepdim=True) - 1,
            past_key_values=self.cache,
            use_cache=True,
        )
        logits: Tensor = output.logits[:, -1]
        return logits


def _joined(batches: Sequence[_Batch]) -> _Batch:
    """One batch of all rows, padded on the left to the longest."""
    length = max(batch.mask.shape[1] for batch in batches)
    cache = DynamicCache()
    for layers in zip(*(batch.cache.layers for batch in batches), strict=True):
        keys, values = (
            torch.cat([pad(tensor, (0, 0, length - tensor.shape[2], 0)) for tensor in tensors])
            for tensors in zip(*((layer.keys, layer.values) for layer in layers), strict=True)
        )
        cache.update(keys, values, len(cache.layers))
    masks = [pad(batch.mask, (length - batch.mask.shape[1], 0)) for batch in batches]
    return _Batch(cache, torch.cat(masks))


def similar_lengths(lengths: Sequence[int]) -> list[list[int]]:
    """Groups of rows, in row order, whose shortest has at least `SIMILAR` of the length of its longest."""
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        if groups and lengths[groups[-1][0]] >= SIMILAR * lengths[row]:
            groups[-1].append(row)
        else:
            groups.append([row])
    return [sorted(group) for group in groups]


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


@dataclass(slots=True)
class _Row:
    """One answer in the making."""

    index: int
    stream: TextStream
    options: GenerationOptions
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    fed: int = 0
    """Tokens given back to the model, which are in the cache with the prompt's."""
    generate_ms: float = 0.0
    choose: Callable[[Tensor, int], int] = field(init=False)

    def __post_init__(self) -> None:
        self.choose = _sampler(self.options)

    def take(self, scores: Tensor, likeliest: int, end_ids: frozenset[int]) -> str:
        """Choose the next token by its scores [vocabulary]; returns the text that is settled by it."""
        token = self.choose(scores, likeliest)
        if token in end_ids:
            self.finish_reason = "stop"
            return self.stream.end(self.token_ids)
        self.token_ids.append(token)
        text = self.stream.push(self.token_ids)
        if self.stream.stopped:
            self.finish_reason = "stop"
        elif len(self.token_ids) == self.options.max_new_tokens:
            self.finish_reason = "length"
            text += self.stream.end(self.token_ids)
        return text

    def cancel(self) -> str:
        self.finish_reason = "canceled"
        return self.stream.end(self.token_ids)

    def outcome(self, prompt_tokens: int, token_bytes: int, prefill_ms: float) -> Generated:
        if self.finish_reason is None:
            raise RuntimeError("a row was left before its end")
        return Generated(
            text=self.stream.given,
            token_ids=tuple(self.token_ids),
            finish_reason=self.finish_reason,
            prompt_tokens=prompt_tokens,
            kv_cache_bytes=(prompt_tokens + self.fed) * token_bytes,
            prefill_ms=prefill_ms,
            generate_ms=self.generate_ms,
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
