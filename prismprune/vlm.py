"""`PrunedVLM`, the object that a user holds: media and questions in, answers with their costs out."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from PIL import Image

from prismprune.budget import TokenBudget
from prismprune.cpu_steps import CpuSteps
from prismprune.decoding import Decoder
from prismprune.encoding import EncodedMedia, EncodingRequest, encode
from prismprune.errors import InvalidOptionError
from prismprune.generation import GenerationOptions
from prismprune.loading import load_checkpoint
from prismprune.media import Clip, Picture, as_picture, open_media
from prismprune.meters import memory_bytes
from prismprune.replay import GraphBytes, granted, replay_of, tower_replay_of
from prismprune.results import Answer
from prismprune.session import Asked, Session, VisualRequest, check_questions

if TYPE_CHECKING:
    import torch

    from prismprune.caching import EncodingCache
    from prismprune.loading import Loaded, Progress
    from prismprune.quantization import Quantization
    from prismprune.session import Pending

__all__ = ["AnswerStream", "EncodedMedia", "GenerationOptions", "PrunedVLM", "VisualRequest"]

Budget = int | str | TokenBudget | None
"""Visual tokens that stay: a number, "all", None (all) or a `TokenBudget`."""
Medium = str | Path | bytes | Image.Image | Picture | Clip
"""A file, a file's bytes, a Pillow image, or media decoded before."""
Answering = Generator[tuple[int, int, str], None, list[list[Answer]]]
"""Yields (request, question, newly settled text, often none) a token; its value are all answers."""
OnToken = Callable[[int, int, str], None]
"""Called with (request, question, newly settled text) of a batch."""
ShouldStop = Callable[[int], bool]
"""Asked with the request's place in the batch before each token; True cancels the request."""


class PrunedVLM:
    """A vision-language model that answers from as many visual tokens as it is told to keep.

        vlm = PrunedVLM.from_pretrained("prism-demo")
        vlm.answer("street.png", "What color is the star?", token_budget=64).text

    One thread at a time may answer.
    """

    def __init__(self, loaded: Loaded, *, cuda_graph_bytes: GraphBytes = 0) -> None:
        self._loaded = loaded
        self._family = loaded.family
        graph_bytes = granted(cuda_graph_bytes, loaded.family.model.device)
        self._decoder = Decoder(
            model=loaded.family.model,
            tokenizer=loaded.family.processor.tokenizer,
            end_ids=loaded.end_ids,
            placeholder_ids=frozenset(loaded.family.placeholder_ids.values()),
            visual_inputs=loaded.family.visual_inputs,
            replay=replay_of(loaded.family.model, loaded.quantization, graph_bytes),
            cpu_steps=CpuSteps.of(loaded.family.model),
        )
        self._family.tower_replay = tower_replay_of(loaded.family.model, graph_bytes)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        quantization: str | Quantization | None = None,
        layout: str | None = None,
        packed_bytes: int = 0,
        cuda_graph_bytes: GraphBytes = 0,
        progress: Progress | None = None,
    ) -> PrunedVLM:
        """Load `"prism-demo"`, a checkpoint directory or a hub id; see `loading.load_checkpoint`.

        cuda_graph_bytes: how much keys and values may take in the places that recorded work of CUDA is tied
        to (see `replay`), or "auto": a quarter of what the model leaves free; 0: nothing is recorded, as on
        other devices.
        """
        return cls(
            load_checkpoint(
                name_or_path,
                revision=revision,
                dtype=dtype,
                device=device,
                quantization=quantization,
                layout=layout,
                packed_bytes=packed_bytes,
                progress=progress,
            ),
            cuda_graph_bytes=cuda_graph_bytes,
        )

    @property
    def name(self) -> str:
        return self._loaded.name

    @property
    def revision(self) -> str | None:
        """Commit of a checkpoint from the hub, if known."""
        return self._loaded.revision

    @property
    def quantization(self) -> str | None:
        return self._loaded.quantization

    @property
    def family(self) -> str:
        return self._family.name

    @property
    def layout(self) -> str:
        """How visual tokens are packed: "native", as transformers does, or another of the family's."""
        return self._family.layout

    @property
    def modalities(self) -> tuple[str, ...]:
        return self._family.modalities

    @property
    def visual_tokens_per_image(self) -> int:
        """Visual tokens of one picture before pruning."""
        return self._family.tokens_per_image

    @property
    def model(self) -> Any:
        """The transformers model itself."""
        return self._family.model

    @property
    def processor(self) -> Any:
        """The checkpoint's own processor, with tokenizer and chat template."""
        return self._family.processor

    @property
    def device(self) -> torch.device:
        device: torch.device = self._family.model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Of what is not quantized."""
        dtype: torch.dtype = self._family.model.dtype
        return dtype

    def memory_bytes(self) -> int:
        """Memory in use now: allocated on CUDA, resident elsewhere."""
        return memory_bytes(self.device)

    @overload
    def answer(
        self, media: Medium | Sequence[Medium], question: str, token_budget: Budget = ..., **options: Any
    ) -> Answer: ...
    @overload
    def answer(
        self,
        media: Medium | Sequence[Medium],
        question: Sequence[str],
        token_budget: Budget = ...,
        **options: Any,
    ) -> list[Answer]: ...
    def answer(
        self,
        media: Medium | Sequence[Medium],
        question: str | Sequence[str],
        token_budget: Budget = None,
        **options: Any,
    ) -> Answer | list[Answer]:
        """Answer a question about media, or a list of questions from one encoding of them.

        media: one or several of: a file, its bytes, a Pillow image, a `Picture`, a `Clip`. `token_budget` is
        of all of them together. `options`: `keep_ratio` (0 to 1] instead of a budget; `method` and
        `method_options`; and the fields of `GenerationOptions`, such as `max_new_tokens` or `stop`.

        Raises a `PrismError` for what a caller can act on.
        """
        request = visual_request(media, question, token_budget, **options)
        answers = self.answer_batch([request])[0]
        return answers[0] if isinstance(question, str) else answers

    def stream(
        self, media: Medium | Sequence[Medium], question: str, token_budget: Budget = None, **options: Any
    ) -> AnswerStream:
        """As `answer`, but an iterator over the answer's text as it comes; `.answer` holds it at the end."""
        request = visual_request(media, question, token_budget, **options)
        return AnswerStream(self._answers([request], None))

    def answer_batch(
        self,
        requests: Sequence[VisualRequest],
        *,
        on_token: OnToken | None = None,
        should_stop: ShouldStop | None = None,
    ) -> list[list[Answer]]:
        """Answer all questions of all requests in one batch: a list a request, an answer a question.

        Greedy answers do not depend on the neighbors (float32), nor does what a seed draws.
        """
        return _run(self._answers(requests, should_stop), on_token) if requests else []

    def encode(
        self,
        media: Medium | Sequence[Medium],
        token_budget: Budget = None,
        *,
        keep_ratio: float | None = None,
        method: str = "prism",
        method_options: Mapping[str, Any] | None = None,
    ) -> EncodedMedia:
        """The visual tokens that stay of `media`, to ask about with `answer_encoded`."""
        budget = TokenBudget.parse(token_budget, keep_ratio=keep_ratio)
        request = EncodingRequest(as_media(media), budget, method, method_options or {})
        return encode(self._family, [request])[0]

    def answer_encoded(
        self,
        encoded: EncodedMedia,
        questions: Sequence[str],
        generation: GenerationOptions | None = None,
        *,
        on_token: OnToken | None = None,
        should_stop: ShouldStop | None = None,
    ) -> list[Answer]:
        """Answer questions about media that were encoded before; the timings are those of then and now."""
        check_questions(questions)  # a text is no tuple of its letters
        session = self.session()
        request = session.prepare(Asked(encoded, tuple(questions), generation or GenerationOptions()))
        session.join([request])
        return _run(_stepped(session, [request], should_stop), on_token)[0]

    def session(self, cache: EncodingCache | None = None) -> Session:
        """A session of its own, for requests that join while others are being answered."""
        return Session(self._family, self._decoder, cache)

    def _answers(self, requests: Sequence[VisualRequest], should_stop: ShouldStop | None) -> Answering:
        session = self.session()
        return (yield from _stepped(session, session.ask(requests), should_stop))


class AnswerStream(Iterator[str]):
    """The text of one answer, piece by piece. Leaving it early ends the generation."""

    def __init__(self, answering: Answering) -> None:
        self._answering = answering
        self._answer: Answer | None = None

    def __next__(self) -> str:
        try:
            while not (text := next(self._answering)[2]):
                continue
        except StopIteration as end:
            if end.value is not None:  # it is once only, and never after `close`
                self._answer = end.value[0][0]
            raise
        return text

    def close(self) -> None:
        """End the generation; there is no `answer` then."""
        self._answering.close()

    @property
    def answer(self) -> Answer:
        """The whole answer; raises `InvalidOptionError` before the text has been read to its end."""
        if self._answer is None:
            raise InvalidOptionError("The answer is there once its text has been read to the end.")
        return self._answer


def visual_request(
    media: Medium | Sequence[Medium],
    question: str | Sequence[str],
    token_budget: Budget = None,
    *,
    keep_ratio: float | None = None,
    method: str = "prism",
    method_options: Mapping[str, Any] | None = None,
    stop: str | Sequence[str] = (),
    **generation: Any,
) -> VisualRequest:
    """The request that `PrunedVLM.answer` makes of its arguments. Decodes media that are files or bytes."""
    if unknown := sorted(generation.keys() - {option.name for option in fields(GenerationOptions)}):
        raise InvalidOptionError(f"Unknown options: {', '.join(unknown)}.")
    return VisualRequest(
        media=as_media(media),
        questions=(question,) if isinstance(question, str) else tuple(question),
        budget=TokenBudget.parse(token_budget, keep_ratio=keep_ratio),
        method=method,
        method_options=method_options or {},
        generation=GenerationOptions(stop=(stop,) if isinstance(stop, str) else tuple(stop), **generation),
    )


def as_media(media: Medium | Sequence[Medium]) -> tuple[Picture | Clip, ...]:
    """Decode what is not decoded yet; raises what `media.open_media` raises."""
    if isinstance(media, (str, Path, bytes, Image.Image, Picture, Clip)):
        return (_decoded(media),)
    return tuple(_decoded(medium) for medium in media)


def _decoded(medium: Medium) -> Picture | Clip:
    if isinstance(medium, (Picture, Clip)):
        return medium
    if isinstance(medium, Image.Image):
        return as_picture(medium)
    return open_media(medium)


def _stepped(session: Session, requests: Sequence[Pending], should_stop: ShouldStop | None) -> Answering:
    """Step until all have been answered."""
    places = {id(request): place for place, request in enumerate(requests)}
    while session.pending:
        for request in session.pending:
            if should_stop is not None and should_stop(places[id(request)]):
                request.cancel()
        for request, number, text in session.step():
            yield places[id(request)], number, text
    return [session.answers(request) for request in requests]


def _run(answering: Answering, on_token: OnToken | None) -> list[list[Answer]]:
    while True:
        try:
            request, question, text = next(answering)
        except StopIteration as end:
            answers: list[list[Answer]] = end.value
            return answers
        if on_token is not None and text:
            on_token(request, question, text)
