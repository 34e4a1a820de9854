"""What an adapter of a model family does: pictures in, visual tokens and prompts out.

An adapter is the only place that knows a transformers class by name. It never decides which tokens stay.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from prismprune.errors import UnknownModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from PIL.Image import Image
    from torch import Tensor

    from prismprune.media import Clip, Picture


@dataclass(frozen=True, slots=True)
class View:
    """One image, crop or frame as the vision tower sees it: `media` is its place in the request.

    `size` is (width, height) in pixels of the upright original; `time_s` is a frame's time in its clip.
    """

    image: Image
    size: tuple[int, int]
    media: int
    crop: int | None = None
    frame: int | None = None
    time_s: float | None = None


@dataclass(frozen=True, slots=True)
class Pixels:
    """Preprocessed views of one size: values [B, 3, height, width], of the views at `places`.

    `boxes` are what each view's patch grid covers: (left, top, right, bottom), in pixels of its original.
    """

    places: tuple[int, ...]
    values: Tensor
    grid: tuple[int, int]
    boxes: tuple[tuple[int, int, int, int], ...]


@dataclass(frozen=True, slots=True)
class Reading:
    """What the vision tower says about one `Pixels`.

    tokens: [B, prefix + N, d], what the projector takes when nothing is pruned; the first `prefix` are no
        patches (a CLS token that the checkpoint keeps).
    attention: computes [B, H, N], float32, one row a head; on call, so that its time counts as scoring.
    """

    tokens: Tensor
    prefix: int
    attention: Callable[[], Tensor]

    @property
    def patches(self) -> Tensor:
        """The candidates, [B, N, d]."""
        return self.tokens[:, self.prefix :]


class Family(ABC):
    """A loaded model of one family, taken apart into the steps between which tokens are dropped."""

    name: ClassVar[str]
    modalities: ClassVar[tuple[str, ...]]

    def __init__(self, model: Any, processor: Any) -> None:
        self.model = model
        self.processor = processor
        if getattr(processor, "chat_template", None) is None:
            raise UnknownModelError(
                "The checkpoint has no chat template, so no prompt can be written for it."
            )

    @staticmethod
    @abstractmethod
    def load(path: str, **options: Any) -> Any:
        """Load the family's model with transformers; `options` are those of its `from_pretrained`."""

    @staticmethod
    @abstractmethod
    def unquantised() -> list[str]:
        """Module names that stay in 16 or 32 bits when the language model is quantised."""

    @abstractmethod
    def views(self, media: Sequence[Picture | Clip]) -> list[View]:
        """The views of one request, one placeholder of the prompt each, in its order."""

    @abstractmethod
    def preprocess(self, views: Sequence[View]) -> list[Pixels]:
        """Resize and normalise as the checkpoint's own processor does; views of one size go together."""

    @abstractmethod
    def read(self, pixels: Pixels) -> Reading:
        """Run the vision tower as far as its output is used."""

    @abstractmethod
    def project(self, tokens: Tensor) -> Tensor:
        """Visual tokens [K, d] to language model embeddings [K, width]."""

    @abstractmethod
    def visual_inputs(self, features: Sequence[Tensor]) -> dict[str, Any]:
        """Arguments of the model's `forward` for projected `features`, one [K, width] a placeholder."""

    @property
    @abstractmethod
    def placeholder_id(self) -> int:
        """Id of the token that stands for one visual token in a prompt."""

    @property
    @abstractmethod
    def tokens_per_image(self) -> int:
        """Visual tokens of one picture before pruning."""

    def prompt_ids(self, question: str, system: str | None, kept: Sequence[int]) -> Tensor:
        """Token ids [T] of the checkpoint's chat template, with `kept[i]` placeholders for view i.

        Control tokens inside the question or the system text are broken up, so that they are read as text.
        """
        pictures = [{"type": "image"} for _ in kept]
        messages = [
            {"role": "user", "content": [*pictures, {"type": "text", "text": self._as_text(question)}]}
        ]
        if system is not None:
            text = {"type": "text", "text": self._as_text(system)}
            messages.insert(0, {"role": "system", "content": [text]})
        prompt = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        tokenizer = self.processor.tokenizer
        has_start = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
        ids = torch.tensor(tokenizer(prompt, add_special_tokens=not has_start)["input_ids"])
        return self._with_placeholders(ids, kept)

    def _with_placeholders(self, ids: Tensor, kept: Sequence[int]) -> Tensor:
        is_placeholder = ids == self.placeholder_id
        written = int(is_placeholder.sum())
        if written != len(kept):
            raise UnknownModelError(
                f"The checkpoint's chat template writes {written} image placeholders for {len(kept)} images."
            )
        repeats = torch.ones_like(ids)
        repeats[is_placeholder] = torch.tensor(kept)
        return ids.repeat_interleave(repeats)

    def _as_text(self, text: str) -> str:
        tokenizer = self.processor.tokenizer
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        for token in special | {tokenizer.convert_ids_to_tokens(self.placeholder_id)}:
            text = text.replace(token, f"{token[0]} {token[1:]}")
        return text
