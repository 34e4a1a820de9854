"""What scoring and selection cost beside the vision tower, and what they cost in public code, in one run.

LLaVA-NeXT's geometry with CLIP-L/14 at 336 px: 5 crops of 576 patches, 24 blocks, 16 heads, 1024 wide, random
weights. The tower runs as the library runs it, up to the block whose output is used, so a method's percentage
is of the smaller of the two times one could take; "plain" is the whole tower without any pruning.

Public code asks the tower for `output_attentions`, which means eager attention and H x N x N values a block,
and selects crop by crop and token by token in Python. Here that is done by the same method, `prism`, on the
same weights and pixels. In float32 both keep the same tokens; in 16 bits public code scores in 16 bits too,
which cannot tell the nearly even attention of random weights apart.

On CUDA the tower is also recorded and replayed, by itself and as the worker does it: launched kernel by
kernel it takes longer than its arithmetic.

    python -m benchmarks.selection --threads 1 --json
    python -m benchmarks.selection --device cuda --dtype float16 --tower-repeats 20
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any, Self

import torch
from transformers import CLIPVisionModel

from benchmarks._measure import MIB, add_threads, listed, machine
from benchmarks.published import clip_l
from prismprune.attention import BlockReading, read_block
from prismprune.loading import torch_dtype
from prismprune.meters import PeakMemory, memory_bytes
from prismprune.quantization import DTYPES
from prismprune.replay import TowerReplay
from prismprune.replay.recording import recorded
from prismprune.selection import METHODS, select

if TYPE_CHECKING:
    from collections.abc import Callable

CROPS, SIDE, BLOCK, HEADS = 5, 336, 22, 16
BUDGETS = (640, 320, 160)  # the paper's, over the five crops
WAYS = {
    "plain": "plain tower, nothing pruned",
    "ours": "this library",
    "public": "as public code",
    "plain_recorded": "plain tower, nothing pruned, recorded",
    "ours_recorded": "this library, its tower recorded",
}


def main() -> None:
    arguments = parsed()
    torch.set_num_threads(arguments.threads)
    with torch.inference_mode():
        device, dtype = torch.device(arguments.device), torch_dtype(arguments.dtype)
        result = measured(arguments.tower_repeats, arguments.repeats, device, dtype)
    print(json.dumps(result, indent=2) if arguments.json else table(result))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--tower-repeats", type=int, default=3, help="timed runs of the tower (one more is dropped)"
    )
    parser.add_argument(
        "--repeats", type=int, default=20, help="timed runs of the rest (one more is dropped)"
    )
    add_threads(parser)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the tower")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def measured(tower_repeats: int, repeats: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    torch.manual_seed(0)
    tower = CLIPVisionModel(clip_l(SIDE)).eval().to(device, dtype)
    pixels = torch.randn(CROPS, 3, SIDE, SIDE, device=device).to(dtype)
    tower_ms, reading = timed(lambda: read(tower, pixels), tower_repeats, device)
    scoring_ms, attention = timed(reading.cls_attention, repeats, device)
    features, keys = reading.hidden[:, 1:], reading.keys[:, 1:].unflatten(2, (HEADS, -1)).transpose(1, 2)
    rows = []
    for method, budget in product(METHODS, BUDGETS):
        work = partial(select, attention, features, budget // CROPS, method, keys=keys)
        select_ms, selection = timed(work, repeats, device)
        both = statistics.median(scoring_ms) + statistics.median(select_ms)
        percent = 100 * both / statistics.median(tower_ms)
        kept = selection.indices.numel()
        rows.append(
            {"method": method, "kept": kept, "select_ms": spread(select_ms), "percent_of_tower": percent}
        )
    return {
        "machine": machine(on_cuda=device.type == "cuda"),
        "tokens": features.shape[0] * features.shape[1],
        "dtype": str(dtype).removeprefix("torch."),
        "attention_implementation": tower.config._attn_implementation,  # noqa: SLF001  # its only name
        "tower_ms": spread(tower_ms),
        "scoring_ms": spread(scoring_ms),
        "selection": rows,
        "end_to_end": end_to_end(tower, pixels, tower_repeats, device),
    }


def end_to_end(
    tower: CLIPVisionModel, pixels: torch.Tensor, repeats: int, device: torch.device
) -> dict[str, Any]:
    """Tower, scores and selection together: the plain tower, this library, and the way of public code.

    On CUDA also the first two with the tower recorded.
    """
    k = BUDGETS[1] // CROPS
    ways: dict[str, Callable[[], Any]] = {
        "plain": lambda: tower(pixels),
        "ours": lambda: library_way(tower, pixels, k),
        "public": lambda: public_way(tower, pixels, k),
    }
    if device.type == "cuda":
        replay = TowerReplay()
        ways["plain_recorded"] = recorded(ways["plain"], None)
        ways["ours_recorded"] = lambda: library_way(tower, pixels, k, replay)
        for _ in range(2):
            ways["ours_recorded"]()  # the second time it is recorded
    times: dict[str, list[float]] = {name: [] for name in ways}
    added: dict[str, int] = dict.fromkeys(ways, 0)
    kept: dict[str, Any] = {}
    for _ in range(repeats + 1):  # in turn, so that all have the same share of a busy machine
        for name, work in ways.items():
            with PeakSampler(device) as peak:
                (*_, elapsed), kept[name] = timed(work, 0, device)
            times[name].append(elapsed)
            added[name] = max(added[name], peak.added_bytes)
    spreads = {name: spread(own[1:]) for name, own in times.items()}
    medians = {name: one["median"] for name, one in spreads.items()}
    return {
        "kept": k * CROPS,
        "ways": {name: one | {"added_bytes": added[name]} for name, one in spreads.items()},
        "ours_of_plain": medians["ours"] / medians["plain"],
        "public_of_ours": medians["public"] / medians["ours"],
        "recorded_of_plain": {
            plain: medians["ours_recorded"] / medians[plain]
            for plain in ("plain", "plain_recorded")
            if plain in medians and "ours_recorded" in medians
        },
        "same_tokens": float((kept["ours"] == kept["public"]).float().mean()),
    }


def library_way(
    tower: CLIPVisionModel, pixels: torch.Tensor, k: int, replay: TowerReplay | None = None
) -> torch.Tensor:
    """Kept tokens [CROPS, k], with the tower's attention as it is."""
    reading = replay.read(tower, pixels, partial(read, tower)) if replay else read(tower, pixels)
    return select(reading.cls_attention(), reading.hidden[:, 1:], k).indices


def public_way(tower: CLIPVisionModel, pixels: torch.Tensor, k: int) -> torch.Tensor:
    """The same tokens by way of every block's attention matrices and a loop over crops and picks."""
    implementation = tower.config._attn_implementation  # noqa: SLF001  # its only name
    tower.set_attn_implementation("eager")
    output = tower(pixels, output_attentions=True, output_hidden_states=True)
    tower.set_attn_implementation(implementation)
    kept = []
    for crop in range(len(pixels)):
        attention = output.attentions[BLOCK][crop, :, 0, 1:]
        features = torch.nn.functional.normalize(output.hidden_states[BLOCK + 1][crop, 1:], dim=-1)
        salient = attention.mean(dim=0).topk(k // 2).indices
        variance = attention.var(dim=0)
        variance[salient] = -1
        pool = variance.topk(4 * (k - k // 2)).indices
        picked = [int(pool[0])]
        while len(picked) < k - k // 2:
            nearest = (1 - features[pool] @ features[picked].T).min(dim=1).values
            picked.append(int(pool[nearest.argmax()]))
        kept.append(torch.cat([salient, torch.tensor(picked, device=salient.device)]).sort().values)
    return torch.stack(kept)


class PeakSampler:
    """Bytes that work adds at its peak: allocated on CUDA, resident elsewhere, as often as one can look."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._before = memory_bytes(self._device)
        self._peak = PeakMemory(self._device)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.added_bytes = self._peak.sample() - self._before

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self._peak.sample()


def read(tower: CLIPVisionModel, pixels: torch.Tensor) -> BlockReading:
    block = tower.get_submodule(f"encoder.layers.{BLOCK}")
    with read_block(block, block.get_submodule("self_attn"), heads=HEADS, scale=64**-0.5) as reading:
        tower(pixels)
    return reading


def timed(work: Callable[[], Any], repeats: int, device: torch.device) -> tuple[list[float], Any]:
    """Milliseconds of each run after the first, if there are several, and what the last one returned."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        result = work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append((time.perf_counter() - start) * 1e3)
    return times[1:] or times, result


def spread(times: list[float]) -> dict[str, float]:
    return {"median": statistics.median(times), "min": min(times), "max": max(times), "runs": len(times)}


def table(result: dict[str, Any]) -> str:
    lines = [
        f"{listed(result['machine'])}, {result['dtype']}; attention: {result['attention_implementation']}",
        f"{result['tokens']} tokens in {CROPS} crops; median (min to max) in milliseconds",
        "",
        f"tower, to block {BLOCK}   {in_words(result['tower_ms'])}",
        f"CLS scores           {in_words(result['scoring_ms'])}",
        "",
        "method         kept  selection                     scores + selection, of the tower",
    ]
    lines += [
        f"{r['method']:<13} {r['kept']:>5}  {in_words(r['select_ms']):<28}  {r['percent_of_tower']:.3f} %"
        for r in result["selection"]
    ]
    return "\n".join([*lines, "", *compared(result["end_to_end"])])


def compared(found: dict[str, Any]) -> list[str]:
    lines = [f"tower, scores and selection of {found['kept']} tokens by prism"]
    for key, way in found["ways"].items():
        memory = way["added_bytes"] / MIB
        lines.append(f"{WAYS[key]:<38}{in_words(way)}, {memory:.0f} MiB more at its peak")
    lines += [
        f"this library, its tower recorded, takes {ratio:.3f} of the time of the {WAYS[plain]}"
        for plain, ratio in found["recorded_of_plain"].items()
    ]
    lines.append(
        f"this library takes {found['ours_of_plain']:.3f} of the plain tower's time; "
        f"public code {found['public_of_ours']:.2f} times this library's; "
        f"{100 * found['same_tokens']:.1f} % of the kept tokens are the same"
    )
    return lines


def in_words(times: dict[str, float]) -> str:
    return f"{times['median']:.2f} ({times['min']:.2f} to {times['max']:.2f})"


if __name__ == "__main__":
    main()
