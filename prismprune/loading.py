"""A name to a loaded model: the embedded demo, a checkpoint directory, or a hub id."""

from __future__ import annotations

import errno
import logging
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoProcessor, BitsAndBytesConfig
from transformers.utils.import_utils import is_bitsandbytes_available

from prismprune.cpu_layers import use_cpu_products
from prismprune.errors import InvalidOptionError, UnknownModelError
from prismprune.families import family_of
from prismprune.hub import origin_of
from prismprune.quantization import DTYPES, Quantization

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from prismprune.families.base import Family

DEMO = "prism-demo"
PACKED_ROWS = 32
"""Of a weight matrix, which bitsandbytes interleaves for its fused product on a CPU."""
NAMED_WEIGHTS = 3
"""Of those that a checkpoint lacks."""
TORN = "PytorchStreamReader failed"
"""What torch says of such a file, in an error of no kind of its own."""
PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
"""What a machine says that cannot read now: that is not the checkpoint's fault, and may go by."""

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, steps done, steps in all)."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model ready to answer. `end_ids` are the tokens that end its answers; see `Quantization.__str__`."""

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
    quantization: str | Quantization | None = None,
    layout: str | None = None,
    packed_bytes: int = 0,
    progress: Progress | None = None,
) -> Loaded:
    """Load `"prism-demo"`, a checkpoint directory or a hub id, with the processor that it comes with.

    dtype: "float32", "bfloat16", "float16"; "auto" is float32 on a CPU and 16 bits on CUDA. device: "cpu",
    "cuda", "cuda:1", ...; "auto" is CUDA where there is one. quantization: None, "int8", "nf4" or
    a `Quantization`, of the language model's layers only unless it says more. layout: how visual tokens are
    packed, one of the family's `layouts`; None: as transformers does. packed_bytes: how much copies of the
    weights as a CPU's kernels like them may take, for faster products; the copies do not notice weights that
    are changed through `.data` later (call `cpu_layers.forget_copies(model)` then).

    Raises `UnknownModelError` for a name that leads to no checkpoint, weights that are damaged or not all
    there, or a family without an adapter, `InvalidOptionError` for an option out of its range or one that
    this machine cannot do, `OSError` where reading fails for now.
    """
    name, quantized = str(name_or_path), Quantization.of(quantization)
    path = resolve(name, progress)
    where = _device(device)
    try:
        origin = origin_of(path, revision)
        config = AutoConfig.from_pretrained(path, **origin)
        family = family_of(config.model_type)
        layout = family.chosen_layout(layout)  # before gigabytes are loaded
        options = _load_options(where, dtype, quantized, family, config)
        model, found = family.load(path, **origin, **options, **_TELLING)
        processor = AutoProcessor.from_pretrained(path, **origin)
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and TORN not in str(error):
            raise
        raise UnknownModelError(f"The weights of {name!r} are damaged or cut short.") from error
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in PASSING:
            raise
        # transformers says at length where it looked; the cause keeps that for whoever runs this.
        raise UnknownModelError(
            f"No model could be loaded from {name!r}: it is neither {DEMO!r} nor a directory with a complete "
            "checkpoint, nor a hub id that can be reached from here or is in the hub's cache."
        ) from error
    made = family(model.eval(), processor, layout)
    _check_weights(name, made, found)
    if where.type == "cpu":
        use_cpu_products(model, packed_bytes, family.outside)
        if quantized is not None and quantized.kind == "nf4":
            pack_only_what_fits(model)
    end_ids = _end_ids(model.generation_config, processor.tokenizer)
    commit = getattr(origin["revision"], "resolved", revision)
    label = str(quantized) if quantized else None
    return Loaded(name, made, end_ids, commit, label)


def resolve(name: str, progress: Progress | None = None) -> str:
    """The directory of the embedded demo, assembled if need be, for its name; any other name as it is."""
    if name != DEMO:
        return name
    from prismprune.demo import checkpoint  # noqa: PLC0415 (assembling it takes packages of their own)

    return str(checkpoint(progress))


_TELLING = {"output_loading_info": True, "ignore_mismatched_sizes": True}
"""For `_check_weights`: transformers fills up at random what is missing, and fails on what does not fit."""


def _check_weights(name: str, family: Family, found: Mapping[str, Any]) -> None:
    """Raise `UnknownModelError` if weights that are read are missing or do not fit.

    found: what transformers tells of its loading.
    """
    # Tied weights are their twins: those are on the list where they are missing themselves.
    missing = found["missing_keys"] - family.model.all_tied_weights_keys.keys()
    misfits = {weight for weight, *_ in found["mismatched_keys"]}
    if broken := sorted(filter(family.reads, missing | misfits)):
        more = len(broken) - NAMED_WEIGHTS
        names = ", ".join(broken[:NAMED_WEIGHTS]) + (f" and {more} more" if more > 0 else "")
        raise UnknownModelError(
            f"{name!r} lacks weights, or has them in other shapes than its config says: {names}."
        )


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
    device: torch.device, dtype: str, quantization: Quantization | None, family: type[Family], config: Any
) -> dict[str, Any]:
    compute = _dtype(dtype, device)
    options = {"dtype": compute, "attn_implementation": "sdpa", "device_map": {"": device}}
    if quantization is not None:
        check_head(quantization, config)
        options["quantization_config"] = _bitsandbytes(quantization, compute, family)
    return options


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if name not in DTYPES:
        raise InvalidOptionError(f"dtype is one of auto, {', '.join(DTYPES)}.")
    return torch_dtype(name)


def torch_dtype(name: str) -> torch.dtype:
    """Torch's number format for one of `DTYPES`."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def check_head(quantization: Quantization, config: Any) -> None:
    """Refuse to quantize a head whose weights are the embedding's too, with `InvalidOptionError`."""
    if "head" in quantization.also and getattr(config, "tie_word_embeddings", False):
        raise InvalidOptionError("This model's head cannot be quantized: its weights are its embedding's.")


def _bitsandbytes(
    quantization: Quantization, compute: torch.dtype, family: type[Family]
) -> BitsAndBytesConfig:
    if not is_bitsandbytes_available():
        raise InvalidOptionError(
            "Quantization needs bitsandbytes, the extra `quantization`: pip install -e '.[quantization]'."
        )
    # A list of one's own replaces that of transformers, which would leave the tower out; it holds for 4 bits
    # as well, and each name is matched from the start of a module's full name.
    spared = quantization.spared(family.outside)
    if quantization.kind == "int8":
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_news)
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=spared)
    chosen = quantization.compute_dtype
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=torch_dtype(chosen) if chosen else compute,
        llm_int8_skip_modules=spared,
    )


def pack_only_what_fits(model: Any) -> None:
    """Keep bitsandbytes from repacking NF4 layers that its fused product cannot compute as asked for.

    On CPUs with AVX512-BF16 it repacks every layer when it is first called, for a product in bfloat16, and
    fails where a row is not whole blocks or the rows are not a multiple of 32.
    """
    from bitsandbytes.nn.modules import Linear4bit  # noqa: PLC0415 (it takes long, and nobody else needs it)

    for module in model.modules():
        if isinstance(module, Linear4bit):
            weight: Any = module.weight
            blocks = module.in_features % weight.quant_state.blocksize == 0
            fits = blocks and module.out_features % PACKED_ROWS == 0
            if not fits or module.compute_dtype is not torch.bfloat16:
                module.support_avx512bf16_for_cpu = False


def _is_news(record: logging.LogRecord) -> bool:
    """Not what bitsandbytes logs for each layer and token: that LLM.int8 computes in float16."""
    return not str(record.msg).startswith("MatMul8bitLt: inputs will be cast")


def _end_ids(generation_config: Any, tokenizer: Any) -> frozenset[int]:
    """Where transformers' `generate` ends; without a configured token, the tokenizer's own end token."""
    ids = generation_config.eos_token_id
    if ids is None:
        ids = tokenizer.eos_token_id
    if ids is None:
        return frozenset()
    return frozenset([ids] if isinstance(ids, int) else ids)
