"""`python -m docs.sizes`: writes the table of sizes in operations.md from `prismprune plan`.

Of published checkpoints whose configs say what is written here; nothing is downloaded, and no weight is made.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import LlavaConfig, LlavaNextConfig, Qwen2_5_VLConfig, VideoLlavaConfig

from benchmarks.published import QWEN_7B, QWEN_TOWER, VICUNA_7B, VICUNA_13B, clip_l, llava
from prismprune.planning import plan
from worker.settings import WorkerSettings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedConfig

    from prismprune.planning import Need

PAGE = Path(__file__).parent / "operations.md"
BEGIN, END = "<!-- python -m docs.sizes -->\n", "<!-- end of sizes -->\n"
PRECISIONS: dict[str, str | None] = {"16 bits": None, "int8": "int8", "NF4": "nf4"}
TEXT_TOKENS = 128
"""Of question and answer."""
BATCH: int = WorkerSettings.model_fields["max_batch"].default
MIB, GIB = 2**20, 2**30


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model by its config, and the budgets to plan it at."""

    name: str
    config: PreTrainedConfig
    budgets: tuple[int, int]


CHECKPOINTS = (
    Checkpoint("LLaVA-1.5-7B", llava(LlavaConfig, clip_l(), VICUNA_7B), (64, 192)),
    Checkpoint("LLaVA-1.5-13B", llava(LlavaConfig, clip_l(), VICUNA_13B), (64, 192)),
    Checkpoint("LLaVA-NeXT-7B", llava(LlavaNextConfig, clip_l(), VICUNA_7B), (160, 640)),
    Checkpoint("LLaVA-NeXT-13B", llava(LlavaNextConfig, clip_l(), VICUNA_13B), (160, 640)),
    Checkpoint("Video-LLaVA-7B", llava(VideoLlavaConfig, clip_l(224), VICUNA_7B), (136, 512)),
    Checkpoint("Qwen2.5-VL-7B", Qwen2_5_VLConfig(text_config=QWEN_7B, vision_config=QWEN_TOWER), (64, 192)),
)


def table() -> str:
    """The table as Markdown: a line a model and budget."""
    precisions = " | ".join(PRECISIONS)
    head = f"| model | visual tokens | keys and values, MiB | {precisions} |"
    return "\n".join(
        [head, "|---|---|---|---|---|---|", *(row for each in CHECKPOINTS for row in rows(each))]
    )


def rows(checkpoint: Checkpoint) -> Iterator[str]:
    """The lines of one model; the last one keeps every token."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.config.save_pretrained(folder)  # it is all that `plan` reads
        plans = {
            (budget, precision): plan(folder, budget, quantization=quantization, text_tokens=TEXT_TOKENS)
            for budget in checkpoint.budgets
            for precision, quantization in PRECISIONS.items()
        }
    for budget in checkpoint.budgets:
        yield _row(checkpoint.name, [plans[budget, precision].budget for precision in PRECISIONS])
    yield _row(checkpoint.name, [plans[checkpoint.budgets[0], each].everything for each in PRECISIONS])


def _row(name: str, needs: list[Need]) -> str:
    """One budget in each precision: the keys and values of one request, and a full batch with its weights."""
    full = (need.weight_bytes + BATCH * (need.kv_bytes + need.activation_bytes) for need in needs)
    cells = [name, str(needs[0].visual_tokens), f"{needs[0].kv_bytes / MIB:,.0f}"]
    return "| " + " | ".join([*cells, *(f"{each / GIB:.1f}" for each in full)]) + " |"


def page() -> str:
    """The whole page with the table of now."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page())
