"""Names to models, and what is said where that fails."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from huggingface_hub import constants

import prismprune.demo
from prismprune.errors import InvalidOptionError, UnknownModelError
from prismprune.loading import load_checkpoint

if TYPE_CHECKING:
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
