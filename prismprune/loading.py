"""A name to a loaded model: the embedded demo, a checkpoint directory, or a hub id."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoProcessor, BitsAndBytesConfig
from transformers.utils.import_utils import is_bitsandbytes_available

from prismprune.errors import InvalidOptionError, UnknownModelError
from prismprune.families import family_of

if TYPE_CHECKING:
    from pathlib import Path

    from prismprune.families.base import Family

DEMO = "prism-demo"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUANTIZATIONS = ("int8", "nf4")

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, steps done, steps in all)."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model ready to answer. `end_ids` are the tokens that end its answers."""

    name: str
    family: Family
    end_ids: frozenset[int]
    revision: str | None
    quantization: str | None


def load_checkpoint(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    quantization: str | None = None,
    layout: str | None = None,
    progress: Progress | None = None,
) -> Loaded:
    """Load `"prism-demo"`, a checkpoint directory or a hub id, with the processor that it comes with.

    dtype: "float32", "bfloat16", "float16"; "auto" is float32 on a CPU and 16 bits on CUDA. device: "cpu",
    "cuda", "cuda:1", ...; "auto" is CUDA where there is one. quantization: None, "int8" or "nf4", of the
    language model's layers only; the tower, the projector and the head stay as they are. layout: how visual
    tokens are packed, one of the family's `layouts`; None: as transformers does.

    Raises `UnknownModelError` for a name that leads to no checkpoint or a family without an adapter,
    `InvalidOptionError` for an option out of its range or one that this machine cannot do.
    """
    name = str(name_or_path)
    path = resolve(name, progress)
    where = _device(device)
    try:
        config = AutoConfig.from_pretrained(path, revision=revision)
        family = family_of(config.model_type)
        layout = family.chosen_layout(layout)  # before gigabytes are loaded
        options = _load_options(where, dtype, quantization, family)
        model = family.load(path, revision=revision, **options).eval()
        processor = AutoProcessor.from_pretrained(path, revision=revision)
    except (OSError, ValueError) as error:
        # transformers says at length where it looked; the cause keeps that for whoever runs this.
        raise UnknownModelError(
            f"No model could be loaded from {name!r}: it is neither {DEMO!r} nor a directory with a complete "
            "checkpoint, nor a hub id that can be reached from here."
        ) from error
    end_ids = _end_ids(model.generation_config, processor.tokenizer)
    commit = getattr(model.config, "_commit_hash", None) or revision
    return Loaded(name, family(model, processor, layout), end_ids, commit, quantization)


def resolve(name: str, progress: Progress | None = None) -> str:
    """The directory of the embedded demo, assembled if need be, for its name; any other name as it is."""
    if name != DEMO:
        return name
    from prismprune.demo import checkpoint  # noqa: PLC0415 (assembling it takes packages of their own)

    return str(checkpoint(progress))


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InvalidOptionError(f"{name!r} is no device.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InvalidOptionError("CUDA is not available here.")
    return device


def _load_options(
    device: torch.device, dtype: str, quantization: str | None, family: type[Family]
) -> dict[str, Any]:
    compute = _dtype(dtype, device)
    options = {"dtype": compute, "attn_implementation": "sdpa", "device_map": {"": device}}
    if quantization is not None:
        options["quantization_config"] = _quantization(quantization, compute, family.unquantised())
    return options


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if name not in DTYPES:
        raise InvalidOptionError(f"dtype is one of auto, {', '.join(DTYPES)}.")
    return DTYPES[name]


def _quantization(name: str, compute: torch.dtype, skip: list[str]) -> BitsAndBytesConfig:
    if name not in QUANTIZATIONS:
        raise InvalidOptionError(f"quantization is one of {', '.join(QUANTIZATIONS)}, or none at all.")
    if not is_bitsandbytes_available():
        raise InvalidOptionError("Quantisation needs bitsandbytes: pip install 'prismprune[quantization]'.")
    # The skip list of that name holds for 4 bits as well.
    if name == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=skip,
    )


def _end_ids(generation_config: Any, tokenizer: Any) -> frozenset[int]:
    """Where transformers' `generate` ends; without a configured token, the tokenizer's own end token."""
    ids = generation_config.eos_token_id
    if ids is None:
        ids = tokenizer.eos_token_id
    if ids is None:
        return frozenset()
    return frozenset([ids] if isinstance(ids, int) else ids)
