"""What scoring and selection cost beside the vision tower, in one run.

LLaVA-NeXT's geometry with CLIP-L/14 at 336 px: 5 crops of 576 patches, 24 blocks, 16 heads, 1024 wide, random
weights. The tower runs as the library runs it, up to the block whose output is used, so the ratio is to the
smaller of the two times one could take.

    python benchmarks/selection.py --threads 1 --json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from prismprune.attention import BlockReading, read_block
from prismprune.selection import METHODS, select

if TYPE_CHECKING:
    from collections.abc import Callable

CROPS, SIDE, BLOCK = 5, 336, 22
BUDGETS = (640, 320, 160)  # the paper's, over the five crops
GEOMETRY: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": SIDE,
    "patch_size": 14,
}


def main() -> None:
    arguments = parsed()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with torch.inference_mode():
        result = measured(arguments.tower_repeats, arguments.repeats, torch.device(arguments.device))
    print(json.dumps(result, indent=2) if arguments.json else table(result))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--tower-repeats", type=int, default=3, help="timed runs of the tower (one more is dropped)"
    )
    parser.add_argument(
        "--repeats", type=int, default=20, help="timed runs of the rest (one more is dropped)"
    )
    parser.add_argument(
        "--threads", type=int, default=None, help="torch's threads; default: torch's own choice"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def measured(tower_repeats: int, repeats: int, device: torch.device) -> dict[str, Any]:
    torch.manual_seed(0)
    tower = CLIPVisionModel(CLIPVisionConfig(**GEOMETRY)).eval().to(device)
    pixels = torch.randn(CROPS, 3, SIDE, SIDE, device=device)
    tower_ms, reading = timed(lambda: read(tower, pixels), tower_repeats, device)
    scoring_ms, attention = timed(reading.cls_attention, repeats, device)
    features = reading.hidden[:, 1:]
    rows = []
    for method, budget in product(METHODS, BUDGETS):
        work = partial(select, attention, features, budget // CROPS, method)
        select_ms, selection = timed(work, repeats, device)
        both = statistics.median(scoring_ms) + statistics.median(select_ms)
        percent = 100 * both / statistics.median(tower_ms)
        kept = selection.indices.numel()
        rows.append(
            {"method": method, "kept": kept, "select_ms": spread(select_ms), "percent_of_tower": percent}
        )
    return {
        "machine": machine(device),
        "tokens": features.shape[0] * features.shape[1],
        "attention_implementation": tower.config._attn_implementation,  # noqa: SLF001  # its only name
        "tower_ms": spread(tower_ms),
        "scoring_ms": spread(scoring_ms),
        "selection": rows,
    }


def read(tower: CLIPVisionModel, pixels: torch.Tensor) -> BlockReading:
    block = tower.get_submodule(f"encoder.layers.{BLOCK}")
    with read_block(block, block.get_submodule("self_attn"), heads=16, scale=64**-0.5) as reading:
        tower(pixels)
    return reading


def timed(work: Callable[[], Any], repeats: int, device: torch.device) -> tuple[list[float], Any]:
    """Milliseconds of each run after the first, and what the last one returned."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        result = work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append((time.perf_counter() - start) * 1e3)
    return times[1:], result


def spread(times: list[float]) -> dict[str, float]:
    return {"median": statistics.median(times), "min": min(times), "max": max(times), "runs": len(times)}


def machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return f"{name}, threads: {torch.get_num_threads()}, torch {torch.__version__}, float32"


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")  # Linux alone says more here than `platform` knows
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['machine']}; attention: {result['attention_implementation']}",
        f"{result['tokens']} tokens in {CROPS} crops; median (min to max) in milliseconds",
        "",
        f"tower, to block {BLOCK}   {in_words(result['tower_ms'])}",
        f"CLS scores           {in_words(result['scoring_ms'])}",
        "",
        "method    kept  selection                     scores + selection, of the tower",
    ]
    lines += [
        f"{r['method']:<8} {r['kept']:>5}  {in_words(r['select_ms']):<28}  {r['percent_of_tower']:.3f} %"
        for r in result["selection"]
    ]
    return "\n".join(lines)


def in_words(times: dict[str, float]) -> str:
    return f"{times['median']:.2f} ({times['min']:.2f} to {times['max']:.2f})"


if __name__ == "__main__":
    main()
