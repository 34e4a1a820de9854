"""The arithmetic that benchmarks hold the stages against."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from prismprune import PrunedVLM
from prismprune.cpu_products import available
from prismprune.planning import stage_flops
from prismprune.session import Asked
from tests.prismprune.tiny import PATCHES, picture, save_tiny_llava

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

KEPT = 6


def linear_flops(values: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    """Of [..., inputs] by [outputs, inputs]."""
    return 2 * math.prod(values) * weight[0]


def counted(work: Callable[[], object]) -> int:
    """Operations of every matrix product that is really done."""
    # Torch's own counter does not know the product that `CpuLinear` calls.
    own = {torch.ops.mkldnn._linear_pointwise: linear_flops} if available() else {}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=own) as counter:
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize("tower", ["clip", "dinov2"])
def test_the_stages_do_nothing_beyond_their_arithmetic(tmp_path: Path, tower: str) -> None:
    """All that torch counts is in the formulas: blocks whose output is not used do not run.

    But for the pairs above the diagonal, which its plain kernel multiplies and then masks.
    """
    vlm = PrunedVLM.from_pretrained(save_tiny_llava(tmp_path, tower=tower), packed_bytes=2**30)
    encoded = vlm.encode(picture(), KEPT)
    session = vlm.session()
    request = session.prepare(Asked(encoded, ("What is it?",)))
    prompt, text = len(request.prompts[0].token_ids), vlm.model.config.text_config
    few, whole = (stage_flops(vlm.model.config, KEPT, prompt - KEPT, looked_at) for looked_at in (KEPT, None))
    # The CLS query, 32 wide, and with all keys, once to know what is looked at and once to select.
    scores = 2 * (32 + 2 * (16 + 1)) * 32
    assert counted(lambda: vlm.encode(picture(), KEPT, method="uniform")) == few.vision + scores
    merged = counted(lambda: vlm.encode(picture())) - 2 * (PATCHES - KEPT) * 32 * (32 + 32)
    assert merged == whole.vision
    # Twice, by queries and by values, in all layers but the last, where only the last token asks.
    masked = (text.num_hidden_layers - 1) * 2 * 2 * text.hidden_size * prompt * (prompt - 1) // 2
    assert counted(lambda: session.join([request])) == few.prefill + masked
    session.step()
    assert counted(session.step) == few.token
