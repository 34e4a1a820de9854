"""Names to models, and what is said where that fails."""

from __future__ import annotations

import errno
import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import prismprune.demo
from prismprune.errors import InvalidOptionError, UnknownModelError
from prismprune.families.llava import LlavaFamily
from prismprune.loading import load_checkpoint
from tests.prismprune.tiny import save_tiny_llava

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from prismprune.loading import Progress


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test asks a hub."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_a_directory_is_loaded_in_float32_with_sdpa_on_a_cpu(tiny_llava: Path) -> None:
    """The automatic number format of a CPU; no layer runs eager attention; nothing is in training mode."""
    model = load_checkpoint(tiny_llava, device="cpu").family.model
    assert model.dtype == torch.float32
    assert not model.training
    implementations = {
        model.config._attn_implementation,
        model.model.vision_tower.config._attn_implementation,
    }
    assert implementations == {"sdpa"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_number_format_can_be_asked_for(tiny_llava: Path, dtype: str) -> None:
    """Tower and language model are in it."""
    model = load_checkpoint(tiny_llava, device="cpu", dtype=dtype).family.model
    assert model.dtype == model.model.vision_tower.dtype == getattr(torch, dtype)


def test_the_demo_is_the_checkpoint_that_the_demo_package_gives(
    tiny_llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name "prism-demo" has it assembled on first use, with progress."""
    calls = []

    def checkpoint(progress: Progress) -> Path:
        progress("assembling", 1, 1)
        return tiny_llava

    monkeypatch.setattr(prismprune.demo, "checkpoint", checkpoint, raising=False)
    loaded = load_checkpoint("prism-demo", device="cpu", progress=lambda *step: calls.append(step))
    assert (loaded.name, calls) == ("prism-demo", [("assembling", 1, 1)])


@pytest.mark.parametrize("name", ["./nowhere", "nobody/nothing", "a b c", ""])
def test_a_name_that_leads_nowhere_is_an_unknown_model(name: str) -> None:
    """No path, no address and no trace of where transformers looked in the message."""
    with pytest.raises(UnknownModelError) as caught:
        load_checkpoint(name)
    assert "http" not in str(caught.value)
    assert "snapshot" not in str(caught.value)


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json", "tokenizer.json"])
def test_an_incomplete_checkpoint_is_an_unknown_model(tiny_llava: Path, tmp_path: Path, missing: str) -> None:
    """A directory without its weights, its config or its tokenizer."""
    broken = tmp_path / "broken"
    shutil.copytree(tiny_llava, broken)
    (broken / missing).unlink()
    with pytest.raises(UnknownModelError, match="complete checkpoint"):
        load_checkpoint(broken, device="cpu")


def rewritten(
    checkpoint: Path, copy: Path, change: Callable[[str, torch.Tensor], torch.Tensor | None]
) -> Path:
    """A copy in which each weight is what `change` makes of it; None: it is left out."""
    shutil.copytree(checkpoint, copy)
    changed = {name: change(name, weight) for name, weight in load_file(copy / "model.safetensors").items()}
    kept = {name: weight for name, weight in changed.items() if weight is not None}
    save_file(kept, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize("left", [0, 5000, -100])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_weights_cut_short_are_an_unknown_model(
    tiny_llava: Path, tmp_path: Path, file: str, left: int
) -> None:
    """In either format, wherever the file ends."""
    torn = tmp_path / "torn"
    shutil.copytree(tiny_llava, torn)
    weights = torn / "model.safetensors"
    if file != weights.name:
        torch.save(load_file(weights), torn / file)
        weights.unlink()
    (torn / file).write_bytes((torn / file).read_bytes()[:left])
    with pytest.raises(UnknownModelError):
        load_checkpoint(torn, device="cpu")


@pytest.mark.parametrize("quantization", [None, "int8", "nf4"])
@pytest.mark.parametrize("part", ["multi_modal_projector", "layers.1.mlp", "layers.2."])
def test_weights_that_are_missing_are_named(
    tiny_llava: Path, tmp_path: Path, part: str, quantization: str | None
) -> None:
    """Rather than drawn at random: the projector's, the language model's, those of the block that is read."""
    hollow = rewritten(tiny_llava, tmp_path / "hollow", lambda name, weight: None if part in name else weight)
    with pytest.raises(UnknownModelError, match=rf"lacks weights.*{part}.* and \d+ more"):
        load_checkpoint(hollow, device="cpu", quantization=quantization)


def test_weights_of_other_shapes_are_named(tiny_llava: Path, tmp_path: Path) -> None:
    """As where a config is another checkpoint's."""
    other = rewritten(
        tiny_llava,
        tmp_path / "other",
        lambda name, weight: weight[:-1] if name.endswith("projector.linear_2.bias") else weight,
    )
    with pytest.raises(
        UnknownModelError, match=r"other shapes.*: model.multi_modal_projector.linear_2.bias\."
    ):
        load_checkpoint(other, device="cpu")


@pytest.mark.parametrize(
    ("tower", "layer", "unread"),
    [
        ("clip", -2, ("encoder.layers.3.", "post_layernorm")),
        ("dinov2", -1, ("vision_tower.layernorm", "mask_token")),
    ],
)
def test_weights_that_nothing_reads_may_be_missing(
    tmp_path: Path, tower: str, layer: int, unread: tuple[str, ...]
) -> None:
    """Blocks behind the one whose output is used, and the norm that comes after them."""
    whole = save_tiny_llava(tmp_path / "whole", tower=tower, layer=layer)
    smaller = rewritten(
        whole, tmp_path / "smaller", lambda name, weight: None if any(map(name.count, unread)) else weight
    )
    assert load_file(smaller / "model.safetensors").keys() < load_file(whole / "model.safetensors").keys()
    load_checkpoint(smaller, device="cpu")


def test_of_tied_weights_one_is_enough(tmp_path: Path) -> None:
    """And neither is too few."""
    tied = save_tiny_llava(tmp_path / "tied", tie_word_embeddings=True)
    assert not [name for name in load_file(tied / "model.safetensors") if "lm_head" in name]
    load_checkpoint(tied, device="cpu")
    none = rewritten(tied, tmp_path / "none", lambda name, weight: None if "embed_tokens" in name else weight)
    with pytest.raises(UnknownModelError, match="embed_tokens"):
        load_checkpoint(none, device="cpu")


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE])
def test_what_cannot_be_read_for_now_is_no_unknown_model(
    tiny_llava: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A worker tries again then."""

    def load(path: str, **options: Any) -> Any:
        raise OSError(number, "not now")

    monkeypatch.setattr(LlavaFamily, "load", staticmethod(load))
    with pytest.raises(OSError, match="not now"):
        load_checkpoint(tiny_llava, device="cpu")


def test_an_error_of_the_machine_keeps_its_name(tiny_llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that runs out is no damaged file."""

    def load(path: str, **options: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(LlavaFamily, "load", staticmethod(load))
    with pytest.raises(torch.OutOfMemoryError):
        load_checkpoint(tiny_llava, device="cpu")


def test_a_family_without_an_adapter_is_named_with_the_known_ones(tmp_path: Path) -> None:
    """A language model has no pictures to prune."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UnknownModelError, match="'llama'; known families are llava"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "options", [{"dtype": "float8"}, {"device": "toaster"}, {"quantization": "int3"}], ids=str
)
def test_options_out_of_range_are_refused(tiny_llava: Path, options: dict[str, Any]) -> None:
    """With an error that lists what there is, or names what there is not."""
    with pytest.raises(InvalidOptionError):
        load_checkpoint(tiny_llava, **options)


def test_cuda_is_refused_where_there_is_none(tiny_llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rather than failing in the middle of loading."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InvalidOptionError, match="CUDA"):
        load_checkpoint(tiny_llava, device="cuda:0")


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_quantization_without_bitsandbytes_says_what_to_install(
    tiny_llava: Path, monkeypatch: pytest.MonkeyPatch, quantization: str
) -> None:
    """The extra of ours that brings it."""
    monkeypatch.setattr("prismprune.loading.is_bitsandbytes_available", lambda: False)
    with pytest.raises(InvalidOptionError, match="extra `quantization`"):
        load_checkpoint(tiny_llava, device="cpu", quantization=quantization)


def test_an_answer_ends_where_transformers_would_end_it(tiny_llava: Path, tmp_path: Path) -> None:
    """At the end tokens of the generation config; without one, at the tokenizer's."""
    (end,) = load_checkpoint(tiny_llava, device="cpu").end_ids
    other = tmp_path / "several"
    shutil.copytree(tiny_llava, other)
    config = json.loads((other / "generation_config.json").read_text())
    (other / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": [5, end]}))
    assert load_checkpoint(other, device="cpu").end_ids == {5, end}
