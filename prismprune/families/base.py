"""What an adapter of a model family does: pictures in, visual tokens and prompts out.

An adapter is the only place that knows a transformers class by name. It never decides which tokens stay.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from PIL import Image

from prismprune.errors import InvalidOptionError, UnknownModelError, UnsupportedMediaError
from prismprune.generation import Prompt
from prismprune.media import Clip

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from prismprune.media import Picture
    from prismprune.replay import TowerReplay

    Wanted = Callable[[int, Tensor], Tensor | None]
    """A view's row and its attention [H, N] to the raster indices [M] of patches; None: all."""

MOST_STRETCHED = 200
"""Longer side to shorter one, of what a processor that keeps the aspect gets: it enlarges a pixel's width to
that of the tower, all along the other side. Qwen2.5-VL's refuses more by itself."""
UNSEEN = Image.new("RGB", (1, 1))
"""The picture of a view of which only processed pixels are at hand."""
Box = tuple[int, int, int, int]
Grid = tuple[int, int]
"""Rows and columns of patches."""
Modality = Literal["image", "video"]


class Region(NamedTuple):
    """A rectangle of a grid, in patches; `bottom` and `right` are the first that are outside."""

    top: int
    left: int
    bottom: int
    right: int

    @classmethod
    def whole(cls, grid: Grid) -> Region:
        """All of a grid."""
        return cls(0, 0, *grid)

    @property
    def shape(self) -> Grid:
        return self.bottom - self.top, self.right - self.left

    @property
    def area(self) -> int:
        """Patches in it."""
        rows, columns = self.shape
        return rows * columns

    def raster(self, grid: Grid) -> Tensor:
        """Its patches [area] as raster indices of the grid, ascending."""
        rows, columns = torch.arange(self.top, self.bottom), torch.arange(self.left, self.right)
        return (rows[:, None] * grid[1] + columns).flatten()


@dataclass(frozen=True, slots=True)
class View:
    """One image, crop or frame as the vision tower sees it: `media` is its place in the request.

    `size` is (width, height) in pixels of the upright original; `time_s` is a frame's time in its clip.
    `others` are the frames behind it that the tower reads as one with it.
    """

    image: Image.Image
    size: tuple[int, int]
    media: int
    crop: int | None = None
    frame: int | None = None
    time_s: float | None = None
    others: tuple[Image.Image, ...] = ()


@dataclass(frozen=True, slots=True)
class Pixels:
    """Preprocessed views of one size: values [B, ...] as the tower takes them, of the views at `places`.

    grid: of what can be chosen from: patches, or units that the tower merges patches to.

    boxes: what each view's patch grid covers, (left, top, right, bottom) in pixels of its original; outside
        of it where the view is padded.
    modality: which of the family's towers reads them, where it has several.
    candidates: the part of each view's grid that the model gets to see; None: all of every grid.
    """

    places: tuple[int, ...]
    values: Tensor
    grid: Grid
    boxes: tuple[Box, ...]
    modality: Modality = "image"
    candidates: tuple[Region, ...] | None = None

    def region(self, row: int) -> Region:
        """What the model gets to see of the view in that row."""
        return Region.whole(self.grid) if self.candidates is None else self.candidates[row]


@dataclass(frozen=True, slots=True)
class Reading:
    """What the vision tower says about one `Pixels`.

    tokens: [B, prefix + N, d], what the projector takes when nothing is pruned; the first `prefix` are no
        patches (a CLS token that the checkpoint keeps).
    attention: computes [B, H, N], float32, one row a head; on call, so that its time counts as scoring.
    keys: computes [B, H, N, head_dim], the keys of the patches in the block that `attention` is read from;
        on call, as few methods ask for them.
    """

    tokens: Tensor
    prefix: int
    attention: Callable[[], Tensor]
    keys: Callable[[], Tensor]

    @property
    def patches(self) -> Tensor:
        """[B, N, d], in raster order."""
        return self.tokens[:, self.prefix :]


@dataclass(frozen=True, slots=True)
class KeptPart:
    """What stays of one view.

    kept: raster indices [K] into `grid`, ascending, on the CPU; None where nothing was pruned: then
        `projected` is everything that the model sees of the view, in order, tokens that are no patches first.
    candidates: the part of the grid that the model gets to see.
    projected: [K, width], as the language model takes them.
    """

    view: View
    grid: Grid
    candidates: Region
    kept: Tensor | None
    projected: Tensor


@dataclass(frozen=True, slots=True)
class Positions:
    """Where the tokens of a medium lie for a language model with positions in three rows.

    tokens: [3, T], slice, row and column of each token that stays, from where the medium begins. advance: how
    far behind its beginning the next token lies.
    """

    tokens: Tensor
    advance: int


@dataclass(frozen=True, slots=True)
class Visual:
    """What one placeholder of a prompt stands for.

    features: [T, width], the tokens that take its place, in order; `newlines` of them are only layout.
    positions: of its tokens; None: one after the other, as if they were words.
    """

    modality: Modality
    features: Tensor
    newlines: int = 0
    positions: Positions | None = None


@dataclass(frozen=True, slots=True)
class Processed:
    """One medium as the checkpoint's own processor hands it to transformers.

    placeholders: how many tokens of its `modality` the processor writes into the prompt for it.
    """

    modality: Modality
    views: tuple[View, ...]
    placeholders: int


class Family(ABC):
    """A loaded model of one family, taken apart into the steps between which tokens are dropped.

    processor: None where media come `processed` and no prompt is written. layout: one of the family's
    `layouts`, how the survivors of a medium are packed; None: the first of them.

    Raises `UnknownModelError` for a checkpoint that the adapter cannot serve, `InvalidOptionError` for a
    layout that the family does not have.
    """

    name: ClassVar[str]
    """The `model_type` of its transformers config."""
    modalities: ClassVar[tuple[Modality, ...]]
    layouts: ClassVar[tuple[str, ...]] = ("native",)
    """"native" is token for token what transformers does."""
    media_inputs: ClassVar[tuple[str, ...]]
    """Arguments of the model's `forward` that hold media as its processor makes them, or say how they lie."""
    outside: ClassVar[Mapping[str, tuple[str, ...]]]
    """Full names of the modules around the language model's layers, by `quantization.PARTS`: these keep their
    16 or 32 bits unless asked, every other linear layer is quantized."""

    def __init__(self, model: Any, processor: Any | None, layout: str | None = None) -> None:
        self.model = model
        self.processor: Any = processor
        self.layout = self.chosen_layout(layout)
        self.tower_replay: TowerReplay | None = None
        """Recorded readings of the tower, where they are wanted and the family can use them."""
        if processor is not None and getattr(processor, "chat_template", None) is None:
            raise UnknownModelError(
                "The checkpoint has no chat template, so no prompt can be written for it."
            )

    @classmethod
    def chosen_layout(cls, layout: str | None) -> str:
        """The layout of that name, the first for None; raises `InvalidOptionError` for an unknown one."""
        if layout is not None and layout not in cls.layouts:
            raise InvalidOptionError(f"The layout of {cls.name} is one of {', '.join(cls.layouts)}.")
        return layout or cls.layouts[0]

    @staticmethod
    @abstractmethod
    def load(path: str, **options: Any) -> Any:
        """What the `from_pretrained` of the family's transformers class gives for these `options`."""

    def reads(self, _weight: str) -> bool:
        """Whether the weight of that full name has a say in anything; of those, none may be missing."""
        return True

    @staticmethod
    @abstractmethod
    def visual_tokens_of(config: Any) -> int:
        """Visual tokens of one picture, or clip, before pruning, as far as a config tells."""

    @abstractmethod
    def views(self, media: Sequence[Picture | Clip]) -> list[View]:
        """The views of one request, in the order of its media; raises `UnsupportedMediaError`."""

    @abstractmethod
    def preprocess(self, views: Sequence[View]) -> list[Pixels]:
        """Resize and normalise as the checkpoint's own processor does; views of one size go together."""

    @abstractmethod
    def processed(self, inputs: Mapping[str, Tensor]) -> tuple[list[Processed], list[Pixels]]:
        """The media among `inputs`, which the checkpoint's own processor made, and the pixels of their views.

        `inputs` are those of `media_inputs` that there are. Places count through the views of all media, one
        medium after the other; sizes and boxes are in processed pixels where the original's are not told.
        """

    def prefix(self, _modality: Modality) -> int:
        """Tokens of a view that are no patches, but are projected with them when nothing is pruned."""
        return 0

    @abstractmethod
    def read(self, pixels: Pixels, wanted: Wanted | None = None) -> Reading:
        """Run the vision tower as far as its output is used.

        wanted: which patches' tokens are used at all; those of others may be zeros then.
        """

    @abstractmethod
    def project(self, tokens: Tensor) -> Tensor:
        """Visual tokens [..., d] to language model embeddings [..., width]."""

    def arrange(self, parts: Sequence[KeptPart]) -> list[Visual]:
        """What the placeholders of one medium stand for, given what stays of its views: a picture a view."""
        return [Visual("image", part.projected) for part in parts]

    @abstractmethod
    def visual_inputs(self, visuals: Sequence[Visual]) -> dict[str, Any]:
        """Arguments of the model's `forward` for the visuals of a batch of prompts, row by row."""

    @property
    @abstractmethod
    def placeholder_ids(self) -> Mapping[Modality, int]:
        """Id of the token that stands for one visual token in a prompt, for each of the modalities."""

    @property
    @abstractmethod
    def tokens_per_image(self) -> int:
        """Visual tokens of one (square) picture before pruning."""

    def prompt(self, question: str, system: str | None, visuals: Sequence[Visual]) -> Prompt:
        """The checkpoint's chat template, with as many placeholders as each of `visuals` has tokens.

        Control tokens inside the question or the system text are broken up, so that they are read as text.
        Raises `UnknownModelError` if the template does not write one placeholder a visual.
        """
        return self.filled(self._template_ids(question, system, visuals), visuals)

    def filled(self, ids: Tensor, visuals: Sequence[Visual]) -> Prompt:
        """The prompt of `ids` [T] that have a single placeholder a visual; raises `UnknownModelError`."""
        return Prompt(ids.repeat_interleave(self.repeats(ids, visuals)), tuple(visuals))

    def repeats(self, ids: Tensor, visuals: Sequence[Visual]) -> Tensor:
        """How often each of `ids` [T] stands in the prompt that they are filled to.

        Raises `UnknownModelError` if there is not one placeholder a visual.
        """
        repeats = torch.ones_like(ids)
        for modality, placeholder in self.placeholder_ids.items():
            own = [visual for visual in visuals if visual.modality == modality]
            marks = (ids == placeholder).nonzero().flatten()
            if len(marks) != len(own):
                raise UnknownModelError(
                    f"The checkpoint's chat template writes {len(marks)} {modality} placeholders "
                    f"for {len(own)} {modality}s."
                )
            repeats[marks] = torch.tensor([len(visual.features) for visual in own], dtype=torch.long)
        return repeats

    def _template_ids(self, question: str, system: str | None, visuals: Sequence[Visual]) -> Tensor:
        """Token ids [T] with a single placeholder a visual."""
        media = [{"type": visual.modality} for visual in visuals]
        messages = [{"role": "user", "content": [*media, {"type": "text", "text": self._as_text(question)}]}]
        if system is not None:
            text = {"type": "text", "text": self._as_text(system)}
            messages.insert(0, {"role": "system", "content": [text]})
        prompt = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        tokenizer = self.processor.tokenizer
        has_start = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
        return torch.tensor(tokenizer(prompt, add_special_tokens=not has_start)["input_ids"])

    def _as_text(self, text: str) -> str:
        tokenizer = self.processor.tokenizer
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        marks = {
            tokenizer.convert_ids_to_tokens(placeholder) for placeholder in self.placeholder_ids.values()
        }
        for token in special | marks:
            text = text.replace(token, f"{token[0]} {token[1:]}")
        return text


def check_stretch(medium: Picture | Clip) -> None:
    """Raise `UnsupportedMediaError` for what is stretched beyond `MOST_STRETCHED`."""
    # A clip's frames may be smaller than the original, and their sides are whole pixels.
    shown = medium.frames[0] if isinstance(medium, Clip) else medium.image
    if max(shown.size) > MOST_STRETCHED * min(shown.size):
        raise UnsupportedMediaError(f"One side is more than {MOST_STRETCHED} times the other.")
