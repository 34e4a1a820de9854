"""Time and memory of an answer, pruned and not, against transformers' own unpruned `generate`, in one run.

    python -m benchmarks.latency                      # the embedded demo model
    python -m benchmarks.latency --model DIRECTORY --budgets all,128,64,32 --json
    python -m benchmarks.latency --random             # random weights in the demo's geometry

Each round asks every configuration once about the same new picture, in an order that moves on from round to
round, so that whatever slows the machine down meets all of them. The first round is dropped. Peak memory is
measured in a process of its own for each configuration, from the loaded model on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
import transformers
from transformers import (
    AutoProcessor,
    Dinov2Config,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.generation.streamers import BaseStreamer

from benchmarks._measure import (
    Spread,
    add_threads,
    apart,
    at_least,
    in_turns,
    kept_tokens,
    listed,
    machine,
    peak_bytes,
    picture,
    reset_peak,
    several,
    touch,
)
from benchmarks._models import IMAGE_TOKEN_ID, PACKED_BYTES, as_the_worker, word_processor
from benchmarks.published import llava
from prismprune import PrunedVLM
from prismprune.heap import keep_freed_memory
from prismprune.loading import DEMO, resolve
from prismprune.meters import memory_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from PIL import Image

BASELINE = "transformers"
QUESTION = "What color is the star?"


@dataclass(frozen=True)
class Run:
    """One answer. Times in milliseconds; `prefill_ms` is the language model's, with the head."""

    first_token_ms: float
    total_ms: float
    prefill_ms: float
    kv_bytes: int
    tokens: int


class Contender(Protocol):
    """One configuration, loaded and ready."""

    model: Any

    def answer(self, image: Image.Image, max_new_tokens: int) -> Run: ...


@dataclass
class Prefill:
    """Notes when transformers' language model begins with the prompt, and when the head has its scores.

    The library tells its own: hooks would make it call its layers as transformers does. Its time has the
    embedding of the prompt, too.
    """

    device: torch.device
    began: float | None = None
    ms: float | None = None

    @contextmanager
    def of(self, model: Any) -> Iterator[None]:
        hooks = (
            model.model.language_model.register_forward_pre_hook(self._begin),
            model.lm_head.register_forward_hook(self._end),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _begin(self, *_: object) -> None:
        if self.began is None:
            self.began = now(self.device)

    def _end(self, *_: object) -> None:
        if self.ms is None and self.began is not None:
            self.ms = (now(self.device) - self.began) * 1000


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class FirstToken(BaseStreamer):
    """Notes when the first generated token comes; `put` gets the prompt before it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._puts = 0
        self.at = 0.0

    def put(self, value: torch.Tensor) -> None:
        del value
        self._puts += 1
        if self._puts == 2:
            self.at = now(self._device)

    def end(self) -> None:
        """Nothing to flush."""


class Unpruned:
    """What a user of transformers alone writes: the checkpoint's processor and `generate`."""

    def __init__(self, path: str) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        # Any: transformers' types say that `to` takes a model.
        model: Any = LlavaForConditionalGeneration.from_pretrained(path, dtype=dtype).eval()
        self.model = model.to(device)
        self.processor = AutoProcessor.from_pretrained(path)
        content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
        self.prompt = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )

    def answer(self, image: Image.Image, max_new_tokens: int) -> Run:
        device = self.model.device
        prefill, first = Prefill(device), FirstToken(device)
        with prefill.of(self.model):
            started = now(device)
            inputs = self.processor(images=image, text=self.prompt, return_tensors="pt").to(device)
            output = self.model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                streamer=first,
                return_dict_in_generate=True,
            )
            self.processor.batch_decode(output.sequences[:, inputs["input_ids"].shape[1] :])
            ended = now(device)
        if prefill.ms is None:
            raise RuntimeError("transformers computes prompts in another way")
        layers = [tensor for layer in output.past_key_values for tensor in layer[:2]]
        return Run(
            first_token_ms=(first.at - started) * 1000,
            total_ms=(ended - started) * 1000,
            prefill_ms=prefill.ms,
            kv_bytes=sum(tensor.numel() * tensor.element_size() for tensor in layers),
            tokens=output.sequences.shape[1] - inputs["input_ids"].shape[1],
        )


class Pruned:
    """The same question to the library, at one budget."""

    def __init__(self, vlm: PrunedVLM, budget: str) -> None:
        self.vlm = vlm
        self.model = vlm.model
        self.budget = budget

    def answer(self, image: Image.Image, max_new_tokens: int) -> Run:
        started = now(self.vlm.device)
        answer = self.vlm.answer(image, QUESTION, self.budget, max_new_tokens=max_new_tokens)
        ended = now(self.vlm.device)
        return Run(
            first_token_ms=answer.timings.time_to_first_token_ms,
            total_ms=(ended - started) * 1000,
            prefill_ms=answer.timings.prefill_ms,
            kv_bytes=answer.memory.kv_cache_bytes,
            tokens=len(answer.token_ids),
        )


def load(path: str, names: list[str]) -> dict[str, Contender]:
    """The contenders by name; all budgets share one model."""
    contenders: dict[str, Contender] = {}
    if BASELINE in names:
        contenders[BASELINE] = Unpruned(path)
    if budgets := [name for name in names if name != BASELINE]:
        vlm = PrunedVLM.from_pretrained(path, packed_bytes=PACKED_BYTES)
        for budget in budgets:
            contenders[budget] = Pruned(vlm, budget)
    return contenders


def measure(contenders: dict[str, Contender], rounds: int, max_new_tokens: int) -> dict[str, list[Run]]:
    """Each round asks all of them about the same new picture."""
    images = {number: picture(number) for number in range(rounds + 1)}

    def side(contender: Contender) -> Callable[[int], Run]:
        return lambda number: contender.answer(images[number], max_new_tokens)

    return in_turns({name: side(contender) for name, contender in contenders.items()}, rounds)


def peak_memory(path: str, name: str, max_new_tokens: int) -> dict[str, int]:
    """Bytes of a process that answers in one way only: with the model loaded, and at the highest after."""
    contender = load(path, [name])[name]
    device = contender.model.device
    touch(contender.model)
    loaded = memory_bytes(device)
    reset_peak(device)
    for number in range(2):
        contender.answer(picture(number), max_new_tokens)
    return {"loaded_bytes": loaded, "peak_bytes": peak_bytes(device)}


def peak_memory_apart(path: str, name: str, max_new_tokens: int) -> dict[str, int]:
    """The same of a process of its own."""
    threads = torch.get_num_threads()
    asked = ("--model", path, "--max-new-tokens", max_new_tokens, "--threads", threads)
    memory: dict[str, int] = apart("benchmarks.latency", "--memory-of", name, *asked)
    return memory


def summary(runs: list[Run]) -> dict[str, dict[str, float]]:
    """Median and quartiles of each measure."""
    return {name: asdict(Spread.of(asdict(run)[name] for run in runs)) for name in asdict(runs[0])}


def report(results: dict[str, Any]) -> str:
    """A table: medians with quartiles, and how many times better than transformers alone."""
    base = results["configurations"][BASELINE]
    lines = [listed(results["machine"])]
    lines.append(
        f"{results['model']}, {results['rounds']} rounds, answers of up to {results['max_new_tokens']} tokens"
        "; median (quartiles), times faster than transformers"
    )
    header = ("tokens", "first token ms", "total ms", "prefill ms", "peak MB (over the model)", "KV kB")
    lines.append("{:<13} {:>28} {:>28} {:>28} {:>25} {:>9}".format(*header))
    for name, one in results["configurations"].items():
        times = [cell(one[key], base[key]) for key in ("first_token_ms", "total_ms", "prefill_ms")]
        over = (one["peak_bytes"] - one["loaded_bytes"]) / 1e6
        memory = f"{one['peak_bytes'] / 1e6:.0f} ({over:.0f})"
        cells = (name, *times, memory, f"{one['kv_bytes']['median'] / 1e3:.0f}")
        lines.append("{:<13} {:>28} {:>28} {:>28} {:>25} {:>9}".format(*cells))
    return "\n".join(lines)


def cell(measure: dict[str, float], base: dict[str, float]) -> str:
    times = base["median"] / measure["median"]
    return f"{measure['median']:.0f} ({measure['q1']:.0f}-{measure['q3']:.0f}) {times:.2f}x"


def save_random(path: str) -> None:
    """A checkpoint of the demo's geometry with random weights: ViT-S/14 at 336 px, and a 135M Llama."""
    text = {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    }
    tower = Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14
    )
    options = {"image_token_index": IMAGE_TOKEN_ID, "vision_feature_layer": -1, "tie_word_embeddings": True}
    model = LlavaForConditionalGeneration(llava(LlavaConfig, tower, text, **options))
    model.generation_config = GenerationConfig(pad_token_id=0)
    model.save_pretrained(path)
    word_processor().save_pretrained(path)


def run(arguments: argparse.Namespace, path: str) -> dict[str, Any]:
    names = [BASELINE, *arguments.budgets]
    runs = measure(load(path, names), arguments.rounds, arguments.max_new_tokens)
    return {
        "machine": machine(on_cuda=torch.cuda.is_available()),
        "model": "random weights in the demo's geometry" if arguments.random else arguments.model,
        "rounds": arguments.rounds,
        "max_new_tokens": arguments.max_new_tokens,
        "configurations": {
            name: summary(runs[name]) | peak_memory_apart(path, name, arguments.max_new_tokens)
            for name in names
        },
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=DEMO, help="a checkpoint directory, a hub id, or the demo")
    parser.add_argument("--random", action="store_true", help="random weights in the demo's geometry")
    parser.add_argument(
        "--budgets", type=several(kept_tokens), default=("all", "128", "64", "32"), help="visual tokens"
    )
    parser.add_argument(
        "--rounds", type=at_least(1), default=10, help="measured rounds, after one that is dropped"
    )
    parser.add_argument("--max-new-tokens", type=at_least(1), default=4)
    add_threads(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)  # how this script calls itself
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    transformers.utils.logging.disable_progress_bar()
    if arguments.memory_of:
        keep_freed_memory()  # as the worker does
        torch.set_num_threads(arguments.threads)
        memory = peak_memory(arguments.model, arguments.memory_of, arguments.max_new_tokens)
        print(json.dumps(memory))
        return
    as_the_worker(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.random:
            save_random(folder)
        results = run(arguments, folder if arguments.random else resolve(arguments.model))
    print(json.dumps(results, indent=2) if arguments.json else report(results))


if __name__ == "__main__":
    main()
