"""What a model needs, told from its config alone."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    Qwen2_5_VLConfig,
    VideoLlavaConfig,
)
from typer.testing import CliRunner

from benchmarks.published import QWEN_7B, QWEN_TOWER, VICUNA_7B, VICUNA_13B, clip_l, llava
from prismprune import InvalidBudgetError, InvalidOptionError, PrunedVLM, UnknownModelError
from prismprune.cli import app
from prismprune.planning import plan
from tests.prismprune.families import CHECKPOINTS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LlavaKind = type[LlavaConfig | LlavaNextConfig | VideoLlavaConfig]


def config_of(folder: Path, kind: LlavaKind, text: dict[str, Any], image_size: int = 336) -> str:
    """A directory that holds nothing but a config of that geometry."""
    llava(kind, clip_l(image_size), text).save_pretrained(folder)
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    return str(folder)


def test_a_7b_takes_half_a_mebibyte_a_token(tmp_path: Path) -> None:
    """LLaVA-1.5-7B in half precision: 288 MiB of keys and values for a picture, 32 for 64 of its tokens."""
    planned = plan(config_of(tmp_path, LlavaConfig, VICUNA_7B), 64, text_tokens=1)
    kept, everything = planned.budget, planned.everything
    assert (kept.visual_tokens, everything.visual_tokens) == (64, 576)
    assert everything.kv_bytes - kept.kv_bytes == (288 - 32) * 2**20
    assert kept.kv_bytes == 65 * 2**19
    assert planned.parameters == pytest.approx(7.06e9, rel=0.01)
    assert kept.weight_bytes == everything.weight_bytes == 2 * planned.parameters


def test_quantized_weights_are_smaller_and_the_tower_is_not(tmp_path: Path) -> None:
    """LLaVA-1.6-13B: 8 bits near a half, NF4 near a quarter plus what stays in half precision."""
    model = config_of(tmp_path, LlavaNextConfig, VICUNA_13B)
    half, int8, nf4 = (
        plan(model, 320, quantization=quantization).budget.weight_bytes
        for quantization in (None, "int8", "nf4")
    )
    assert half == pytest.approx(26.7e9, rel=0.02)
    stays = half - 2 * 40 * (4 * 5120**2 + 3 * 5120 * 13824)  # all but the language model's linear layers
    assert int8 == pytest.approx(stays + (half - stays) / 2, rel=0.01)
    assert nf4 == pytest.approx(stays + (half - stays) / 4 * 1.032, rel=0.01)


@pytest.mark.parametrize(
    ("kind", "image_size", "tokens"),
    [(LlavaConfig, 336, 576), (LlavaNextConfig, 336, 2880), (VideoLlavaConfig, 224, 2048)],
)
def test_each_family_knows_its_pictures_tokens(
    tmp_path: Path, kind: LlavaKind, image_size: int, tokens: int
) -> None:
    """And another number, of several pictures say, can be given instead."""
    model = config_of(tmp_path, kind, VICUNA_7B, image_size)
    assert plan(model, "all").budget == plan(model).everything
    assert plan(model).everything.visual_tokens == tokens
    assert plan(model, 64, visual_tokens=9999).everything.visual_tokens == 9999


def test_qwen2_5_vl_7b_is_planned_by_its_own_geometry(tmp_path: Path) -> None:
    """8.29 G parameters, 56 KiB a token (4 key-value heads), 2 x 2 patches of the tower in each token."""
    Qwen2_5_VLConfig(text_config=QWEN_7B, vision_config=QWEN_TOWER).save_pretrained(tmp_path)
    planned = plan(str(tmp_path), 64)
    assert planned.parameters == pytest.approx(8.29e9, rel=0.001)
    assert planned.everything.kv_bytes == (576 + 64) * 56 * 2**10
    assert planned.budget.activation_bytes == 576 * 4 * (6 * 1280 + 3420) * 2


def test_the_prefills_operations_follow_the_formula(tmp_path: Path) -> None:
    """Two operations a multiply-accumulate, a gated MLP, text tokens included."""
    n, layers, d, m = 64 + 10, 32, 4096, 11008
    planned = plan(config_of(tmp_path, LlavaConfig, VICUNA_7B), 64, text_tokens=10)
    assert planned.budget.prefill_flops == 2 * layers * (2 * n * d * 2 * d + 2 * n * n * d + 3 * n * d * m)


@pytest.mark.parametrize("name", sorted(CHECKPOINTS))
def test_weights_are_those_of_the_loaded_model(checkpoints: Callable[[str], Path], name: str) -> None:
    """To the byte, for every family's tiny checkpoint."""
    folder = checkpoints(name)
    model = PrunedVLM.from_pretrained(folder, device="cpu").model
    loaded = sum(parameter.nbytes for parameter in model.parameters())
    assert plan(str(folder), 4, dtype="float32").budget.weight_bytes == loaded


@pytest.mark.demo
def test_the_demo_needs_what_was_planned() -> None:
    """Its weights and the keys and values of an answer, to the byte."""
    vlm = PrunedVLM.from_pretrained("prism-demo", device="cpu", dtype="float32")
    assert isinstance(vlm.model, LlavaForConditionalGeneration)
    answer = vlm.answer("examples/scene.png", "What color is the star?", 64)
    fed = answer.prompt_tokens + len(answer.token_ids)  # the end token is never fed
    planned = plan("prism-demo", 64, dtype="float32", text_tokens=fed - 64)
    assert planned.budget.weight_bytes == sum(parameter.nbytes for parameter in vlm.model.parameters())
    assert planned.budget.kv_bytes == answer.memory.kv_cache_bytes


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"dtype": "int3"}, InvalidOptionError),
        ({"quantization": "fp4"}, InvalidOptionError),
        ({"text_tokens": 0}, InvalidOptionError),
        ({"visual_tokens": 0}, InvalidOptionError),
        ({"token_budget": 0}, InvalidBudgetError),
    ],
)
def test_nonsense_is_refused(tmp_path: Path, changes: dict[str, Any], error: type[Exception]) -> None:
    """Before anything is counted."""
    with pytest.raises(error):
        plan(config_of(tmp_path, LlavaConfig, VICUNA_7B), **changes)


def test_what_has_no_config_or_no_adapter_is_named(tmp_path: Path) -> None:
    """An empty directory, and a model that is no vision-language model."""
    with pytest.raises(UnknownModelError, match=r"config\.json"):
        plan(str(tmp_path))
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(UnknownModelError, match="known families"):
        plan(str(tmp_path))


def test_the_command_prints_the_same(tmp_path: Path) -> None:
    """A table for people, JSON for programs; no weight has been made on the way."""
    model = config_of(tmp_path, LlavaConfig, VICUNA_7B)
    table = CliRunner().invoke(app, ["plan", model, "-b", "64", "--quantization", "nf4"])
    assert table.exit_code == 0, table.output
    assert "all 576" in table.output
    told = json.loads(CliRunner().invoke(app, ["plan", model, "--json"]).stdout)
    assert told["budget"]["kv_bytes"] == plan(model, 64).budget.kv_bytes
    assert torch.get_default_device().type == "cpu"
