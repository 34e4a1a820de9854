"""torch.compile on this CPU, beside the same model as transformers has it and as the worker has it, in turns.

    python -m benchmarks.compiled --threads 2
    python -m benchmarks.compiled --model DIRECTORY --rounds 9 --json compiled.json

One picture through the tower, a prompt of so many tokens and a decoding step behind it, of a LLaVA-1.5 in
float32. Compiled code is Inductor's with the weights taken for constants (`freezing`); its steps write to
transformers' `StaticCache`, which is made for it, others to caches that grow. It takes a C++ compiler, and
half a minute a stage, again for each new length.
"""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache, LlavaForConditionalGeneration, StaticCache

from benchmarks._measure import Spread, in_turns, markdown, options, plotted, publish, ratios
from benchmarks._models import PACKED_BYTES, as_the_worker
from prismprune import PrunedVLM
from prismprune.batches import Batch, roomy_cache
from prismprune.cpu_steps import CpuSteps
from prismprune.loading import DEMO, resolve

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor

    Works = dict[str, Callable[[], Tensor]]

PROMPT = 82
"""Tokens of a question about a picture of 64."""
ROOM = 128
WAYS = ("compiled", "worker")


def main() -> None:
    parser = options(__doc__, rounds=15)
    parser.add_argument("--model", default=DEMO, help="a directory with a LLaVA-1.5, or its hub id")
    asked = parser.parse_args()
    if not any(map(shutil.which, ("g++", "clang++"))):
        raise SystemExit("torch.compile needs a C++ compiler on a CPU, and there is none.")
    as_the_worker(asked.threads)
    path = resolve(asked.model)
    plain: Any = LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
    worker = PrunedVLM.from_pretrained(path, device="cpu", dtype="float32", packed_bytes=PACKED_BYTES).model
    with torch.no_grad():
        taken = {
            stage: measured(works, asked.rounds)
            for stage, works in (
                ("a picture's tower", towers(plain, worker)),
                (f"a prompt of {PROMPT}", prompts(plain, worker)),
                ("a step of 1", steps(plain, worker)),
            )
        }
    rows = [
        (stage, Spread.of(1e3 * each for each in own["plain"]), *(faster(own, way) for way in WAYS))
        for stage, own in taken.items()
    ]
    table = markdown(["", "transformers, ms", *(f"times as fast: {way}" for way in WAYS)], rows)
    results = {stage: {way: asdict(faster(own, way)) for way in WAYS} for stage, own in taken.items()}
    publish(asked, {"times_as_fast": results}, table, partial(plot, taken))


def compiled(work: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """One graph, or it raises."""
    return torch.compile(work, fullgraph=True, options={"freezing": True})


def towers(plain: Any, worker: Any) -> Works:
    side = math.isqrt(plain.config.image_seq_length) * plain.config.vision_config.patch_size
    pixels = torch.randn(1, 3, side, side)

    def through(model: Any, pixels: Tensor) -> Tensor:
        states: Tensor = model.model.vision_tower(pixel_values=pixels).last_hidden_state
        return states

    return works(through, plain, worker, pixels)


def prompts(plain: Any, worker: Any) -> Works:
    embeds = torch.randn(1, PROMPT, plain.config.text_config.hidden_size)

    def through(model: Any, embeds: Tensor) -> Tensor:
        states = model.model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        logits: Tensor = model.lm_head(states[:, -1])
        return logits

    return works(through, plain, worker, embeds)


def works(through: Callable[[Any, Tensor], Tensor], plain: Any, worker: Any, given: Tensor) -> Works:
    """The same through each of them."""

    @torch.inference_mode()
    def by_worker() -> Tensor:
        return through(worker, given)

    graph = compiled(partial(through, plain))
    return {
        "plain": partial(through, plain, given),
        "compiled": partial(graph, given),
        "worker": by_worker,
    }


def steps(plain: Any, worker: Any) -> Works:
    """Each feeds the same token: compiled behind the prompt each time, others behind the last one."""
    ids = torch.arange(PROMPT)[None]
    still: Any = StaticCache(plain.config, max_cache_len=ROOM)
    growing: Any = DynamicCache(config=plain.config)
    for cache in (still, growing):
        plain.model.language_model(input_ids=ids, past_key_values=cache, use_cache=True)

    def fed(cache: Any, token: Tensor, place: int) -> Tensor:
        states = plain.model.language_model(
            input_ids=token,
            position_ids=torch.full_like(token, place),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        logits: Tensor = plain.lm_head(states[:, -1])
        return logits

    def in_place(token: Tensor) -> Tensor:
        for layer in still.layers:
            layer.cumulative_length.fill_(PROMPT)
        return fed(still, token, PROMPT)

    def by_transformers() -> Tensor:
        return fed(growing, token, growing.get_seq_length())

    batch = Batch(roomy_cache(), torch.zeros(1, 0, dtype=torch.long), torch.tensor([PROMPT]), None)
    with torch.inference_mode():
        batch.extend(worker, ids, torch.ones_like(ids), ids)
    own = CpuSteps.of(worker)
    if own is None:
        raise SystemExit("This CPU takes plain steps: there is nothing to compare.")

    @torch.inference_mode()
    def by_worker() -> Tensor:
        logits = own.step(batch, [1])
        if logits is None:
            raise RuntimeError("the worker's model takes plain steps")
        return logits

    token, graph = torch.ones(1, 1, dtype=torch.long), compiled(in_place)
    return {
        "plain": by_transformers,
        "compiled": partial(graph, token),
        "worker": by_worker,
    }


def measured(works: Works, rounds: int) -> dict[str, list[float]]:
    """Seconds of each way; raises unless all give the same, up to rounding."""
    said = {way: work() for way, work in works.items()}
    for each in said.values():
        torch.testing.assert_close(each, said["plain"], rtol=1e-3, atol=1e-3)

    def seconds(way: str, _round: int) -> float:
        began = time.perf_counter()
        works[way]()
        return time.perf_counter() - began

    return in_turns({way: partial(seconds, way) for way in works}, rounds)


def faster(taken: Mapping[str, list[float]], way: str) -> Spread:
    """How many times as fast as transformers' own."""
    return ratios(taken["plain"], taken[way])


def plot(taken: Mapping[str, Mapping[str, list[float]]], file: Path) -> None:
    """Bars of each way beside each other."""
    with plotted(file) as axes:
        for number, way in enumerate(WAYS):
            places = [place + 0.4 * number for place in range(len(taken))]
            axes.bar(places, [faster(own, way).median for own in taken.values()], 0.4, label=way)
        axes.axhline(1, color="grey", linewidth=1, label="transformers")
        axes.set_xticks(range(len(taken)), list(taken))
        axes.set(ylabel="times as fast")


if __name__ == "__main__":
    main()
