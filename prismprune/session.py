"""Requests that are answered together, each from when it comes until its own end (continuous batching)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from prismprune.budget import TokenBudget
from prismprune.decoding import Decoder, Running
from prismprune.encoding import EncodedMedia, EncodingRequest, encode
from prismprune.errors import InvalidOptionError
from prismprune.generation import GenerationOptions, check_text
from prismprune.meters import PeakMemory, Stopwatch
from prismprune.results import Answer, Memory, Timings

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

    from prismprune.caching import EncodingCache
    from prismprune.families.base import Family
    from prismprune.generation import Generated, Prompt, Row
    from prismprune.media import Clip, Picture


@dataclass(frozen=True, slots=True)
class VisualRequest:
    """Questions about the same media, answered from one encoding at one budget of visual tokens.

    media_key: names the media's content and how frames were sampled, for a cache of encodings; None: it is
    not cached. encoded: the encoding, where it is there already; then `media` may be empty.
    """

    media: tuple[Picture | Clip, ...]
    questions: tuple[str, ...]
    budget: TokenBudget = field(default_factory=TokenBudget.all)
    method: str = "prism"
    method_options: Mapping[str, Any] = field(default_factory=dict)
    generation: GenerationOptions = field(default_factory=GenerationOptions)
    media_key: Hashable | None = None
    encoded: EncodedMedia | None = None

    def __post_init__(self) -> None:
        check_questions(self.questions)

    @property
    def encoding_key(self) -> Hashable | None:
        """What its encoding is cached by: all that decides it, and no question."""
        if self.media_key is None:
            return None
        return self.media_key, self.budget, self.method, frozenset(self.method_options.items())

    def encoding(self) -> EncodingRequest:
        """The part that no question changes."""
        return EncodingRequest(self.media, self.budget, self.method, self.method_options)


Event = tuple["Pending", int, str]
"""A question of a request has a new token; the text that is settled by it, often none."""


@dataclass(frozen=True, slots=True)
class Asked:
    """Questions about encoded media. Raises `InvalidOptionError` if there is none.

    cached: whether the encoding was found ready, so that none of its time and all of its tokens were saved.
    media_key: what the encoding is cached by, where it is.
    """

    encoded: EncodedMedia
    questions: tuple[str, ...]
    generation: GenerationOptions = field(default_factory=GenerationOptions)
    cached: bool = False
    media_key: Hashable | None = None

    def __post_init__(self) -> None:
        check_questions(self.questions)


class Pending:
    """A request on its way to its answers, from `Session.prepare`."""

    def __init__(self, asked: Asked, prompts: Sequence[Prompt], prompts_ms: float) -> None:
        self.asked = asked
        self.prompts = prompts
        self.prompts_ms = prompts_ms
        self.rows: list[Row] = []
        self.peak_bytes = 0
        self.shared_with = 0
        """The most other requests that were in the session at one time with it."""

    @property
    def lengths(self) -> list[int]:
        """Of each question without its answer: tokens of its text, visual ones, and of the longest answer."""
        longest = self.asked.generation.max_new_tokens
        open_ends = [row.finish_reason is None for row in self.rows] or [True] * len(self.prompts)
        return [
            len(prompt.token_ids) + longest
            for prompt, is_open in zip(self.prompts, open_ends, strict=True)
            if is_open
        ]

    @property
    def done(self) -> bool:
        """Whether every question has its answer."""
        return bool(self.rows) and all(row.finish_reason is not None for row in self.rows)

    def cancel(self) -> None:
        """End what is unfinished as "canceled"; it leaves the session with the next step."""
        for row in self.rows:
            if row.finish_reason is None:
                row.cancel()


class Session:
    """Answers requests with one model.

    One thread at a time may use it, and no other session meanwhile; only `encode` may run beside the rest.

        (request,) = session.ask([VisualRequest(media, ("What color is it?",), TokenBudget(64))])
        while session.pending:
            for request, question, text in session.step():
                ...
        session.answers(request)

    cache: where encodings, and the prefixes of prompts, are looked for and kept; None: nowhere.

    Greedy answers do not depend on the neighbors (float32), nor does what a seed draws.
    """

    def __init__(self, family: Family, decoder: Decoder, cache: EncodingCache | None = None) -> None:
        self._family = family
        self._decoder = decoder
        self._cache = cache
        self._device = family.model.device
        self._running = Running(decoder, None if cache is None else cache.prefixes)
        self._memory = PeakMemory(self._device)
        self._encoding_peak = 0  # what was seen since an encoding began: whose it is joins later
        self._context = context_length(family.model.config.get_text_config())
        self.pending: list[Pending] = []

    @property
    def tokens(self) -> int:
        """Room in the cache that the pending requests may come to take."""
        return self.tokens_with(())

    def tokens_with(self, more: Sequence[Pending]) -> int:
        """As `tokens`, were `more` among them. Rows of the cache are padded to the longest."""
        lengths = [length for request in (*self.pending, *more) for length in request.lengths]
        return len(lengths) * max(lengths, default=0)

    def ask(self, requests: Sequence[VisualRequest]) -> list[Pending]:
        """Encode the requests' media, those of one size in one run of the tower, and join.

        Raises what `encode` and `admit` raise: then none of them has joined.
        """
        return self.admit(self.encode(requests))

    def admit(self, asked: Sequence[Asked]) -> list[Pending]:
        """Write the prompts, prefill them and join; raises what `prepare` and `join` raise."""
        pending = [self.prepare(one) for one in asked]
        self.join(pending)
        return pending

    def encode(self, requests: Sequence[VisualRequest]) -> list[Asked]:
        """Each encoding is made once, also where several of the requests ask for it.

        Another thread may do this while one steps: the tower and the projector are its own, and on CUDA its
        stream may be. Raises what `encoding.encode` raises.
        """
        self._encoding_peak = 0
        keyed = [(_own_key(request), request) for request in requests]
        ready = {key: found for key, request in keyed if (found := self._look_up(request)) is not None}
        missing = {key: request for key, request in reversed(keyed) if key not in ready}
        encodings = (
            encode(self._family, [request.encoding() for request in missing.values()]) if missing else []
        )
        made = dict(zip(missing, encodings, strict=True))
        for key, request in missing.items():
            if self._cache is None or request.encoding_key is None:
                continue
            if self._cache.takes(made[key].bytes):  # else the copy would be for nothing
                self._cache.put(key, made[key].apart())
        return [
            Asked(
                ready.get(key) or made[key],
                request.questions,
                request.generation,
                cached=missing.get(key) is not request,
                media_key=request.encoding_key,
            )
            for key, request in keyed
        ]

    def _look_up(self, request: VisualRequest) -> EncodedMedia | None:
        if request.encoded is not None or self._cache is None or request.encoding_key is None:
            return request.encoded
        return self._cache.get(request.encoding_key)

    def prepare(self, asked: Asked) -> Pending:
        """Write the prompts of a request.

        Raises `UnknownModelError` if the chat template cannot, `InvalidOptionError` where a prompt and the
        longest answer to it are more than the model's context.
        """
        watch = Stopwatch(self._device)
        encoded, system = asked.encoded, asked.generation.system
        prompts = [
            replace(self._family.prompt(text, system, encoded.visuals), media_key=asked.media_key)
            for text in asked.questions
        ]
        pending = Pending(asked, prompts, watch.lap_ms())
        if (longest := max(pending.lengths)) > self._context:
            visual = encoded.visual_tokens.kept + encoded.visual_tokens.newlines
            raise InvalidOptionError(
                f"A prompt with its answer may take {longest} tokens, {visual} of them visual; the model's "
                f"context has {self._context:g}. Ask with a smaller budget, fewer words or a shorter answer."
            )
        return pending

    def join(self, requests: Sequence[Pending]) -> None:
        """Prefill the requests' prompts; their first tokens come with a later step.

        If this raises, for want of memory say, none of them has joined, and the others are as they were.
        """
        rows = iter(
            self._running.join(
                [prompt for request in requests for prompt in request.prompts],
                [request.asked.generation for request in requests for _ in request.prompts],
            )
        )
        for request in requests:
            request.rows = [next(rows) for _ in request.prompts]
        self.pending += requests
        for request in self.pending:
            request.shared_with = max(request.shared_with, len(self.pending) - 1)
        self._note_memory()
        for request in requests:
            request.peak_bytes = max(request.peak_bytes, self._encoding_peak)

    def step(self) -> list[Event]:
        """A token for each unfinished row; requests whose rows have all ended are no longer pending."""
        owners = {
            id(row): (request, number) for request in self.pending for number, row in enumerate(request.rows)
        }
        events = [(*owners[id(row)], text) for row, text in self._running.step()]
        self._note_memory()
        self.pending = [request for request in self.pending if not request.done]
        return events

    def answers(self, request: Pending) -> list[Answer]:
        """An answer a question, of a request that is `done`.

        Raises `InvalidScoresError` where the model's scores for one of them were no numbers.
        """
        return [self._answer(request, row.outcome()) for row in request.rows]

    def make_room(self) -> bool:
        """Drop what takes memory only to be faster; False if there was none of it.

        Nobody may `encode` meanwhile: of what is dropped the recorded towers are read there.
        """
        faster = (self._cache, self._decoder.replay, self._family.tower_replay)
        kept = [each for each in faster if each is not None and each.bytes]
        for each in kept:
            each.clear()
        return bool(kept)

    def _note_memory(self) -> None:
        peak = self._memory.lap()
        self._encoding_peak = max(self._encoding_peak, peak)
        for request in self.pending:
            request.peak_bytes = max(request.peak_bytes, peak)

    def _answer(self, request: Pending, outcome: Generated) -> Answer:
        encoded, cached = request.asked.encoded, request.asked.cached
        visual = encoded.visual_tokens
        return Answer(
            text=outcome.text,
            token_ids=outcome.token_ids,
            finish_reason=outcome.finish_reason,
            prompt_tokens=outcome.prompt_tokens,
            visual_tokens=visual,
            timings=_timings(Timings() if cached else encoded.timings, outcome, request.prompts_ms),
            memory=Memory(str(self._device), request.peak_bytes, outcome.kv_cache_bytes),
            warnings=encoded.warnings,
            token_map=encoded.token_map,
            cached_tokens=visual.kept + visual.newlines if cached else 0,
        )


def context_length(text_config: Any) -> float:
    """Tokens that positions of a language model reach to; infinite where its config does not say.

    Positions that are scaled reach further: `linear` and `dynamic` by their factor, `yarn` by its factor from
    the length it began with. Others' lengths are those of their scaled positions already.
    """
    length: float = getattr(text_config, "max_position_embeddings", None) or math.inf
    scaling = getattr(text_config, "rope_parameters", None) or {}
    factor = scaling.get("factor") or 1.0
    match scaling.get("rope_type"):
        case "linear" | "dynamic":
            return length * factor
        case "yarn":
            return max(length, factor * (scaling.get("original_max_position_embeddings") or length))
        case _:
            return length


def _own_key(request: VisualRequest) -> Hashable:
    """Requests without a key are told apart by themselves."""
    return id(request) if request.encoding_key is None else request.encoding_key


def check_questions(questions: Sequence[str]) -> None:
    """Raise `InvalidOptionError` if there is none, or one that is no text."""
    if not questions:
        raise InvalidOptionError("A request needs at least one question.")
    if isinstance(questions, str):  # a sequence, too, of its letters
        raise InvalidOptionError("Questions are a tuple of texts, not a text.")
    for text in questions:
        check_text(text, "A question")


def _timings(encoded: Timings, outcome: Generated, prompts_ms: float) -> Timings:
    """Writing prompts counts as preprocessing; the whole is the sum of its stages, decoding included."""
    preprocess_ms = encoded.preprocess_ms + prompts_ms
    encode_ms = encoded.decode_ms + preprocess_ms + encoded.vision_ms + encoded.select_ms
    first_token_ms = encode_ms + outcome.prefill_ms
    return replace(
        encoded,
        preprocess_ms=preprocess_ms,
        prefill_ms=outcome.prefill_ms,
        generate_ms=outcome.generate_ms,
        time_to_first_token_ms=first_token_ms,
        total_ms=first_token_ms + outcome.generate_ms,
    )
