"""This service under load, beside what else would serve the same model on this machine's CPU.

    python -m benchmarks.serving --threads 2 --cores 0,1 --json serving.json --plot serving.png
    python -m benchmarks.serving --clients 1,2,4,8,16,32 --rates 0.5,1,2 --rounds 5

The sides: this service at several budgets, `transformers serve`, vLLM on the CPU and LitServe around plain
transformers. All serve one checkpoint (`checkpoint.py`), in one number format (`--dtype`), on the same cores,
and are asked the same questions about the same pictures; every answer has the same number of tokens. Every
request of a round shows a picture that nobody has asked about before, so that no cache decides anything. The
sides take turns in every round, in an order that moves on, so that whatever slows the machine down meets all
of them; while one is asked, the processes of the others are stopped.

What vLLM and LitServe need is installed once, in environments below --cache (vLLM: 6 GB).
"""

from __future__ import annotations

import asyncio
import operator
import os
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks._measure import at_least, kept_tokens, one_of, options, processor, several, write_json
from benchmarks._models import GEOMETRIES
from benchmarks.serving.asking import Contender, closed_loop, open_loop, questions
from benchmarks.serving.checkpoint import FOLDER, checkpoint
from benchmarks.serving.report import Load, Row, plot, rows, table
from benchmarks.serving.rivals import litserve_plain, vllm_cpu
from benchmarks.serving.rivals.litserve_plain import LitServePlain
from benchmarks.serving.rivals.ours import PrismPrune
from benchmarks.serving.rivals.transformers_serve import TransformersServe
from benchmarks.serving.rivals.vllm_cpu import VllmCpu
from benchmarks.serving.servers import Keeper, at_rest, leave_by_sigterm
from prismprune.settings import LibrarySettings

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    from benchmarks.serving.asking import Round
    from benchmarks.serving.servers import Rival

SAME = 4
"""Questions that all sides answer before anything is measured."""
RIVALS = ("transformers", "vllm", "litserve")
AGAIN = 2
"""Requests of each client that make a closed loop: with one, all begin together, and the median is of a queue
that only grows shorter."""
SINGLE = {name for name, geometry in GEOMETRIES.items() if geometry.crops == 1}
"""Geometries of one view a picture."""


def main() -> None:
    asked = parsed()
    leave_by_sigterm()
    if asked.cores:
        os.sched_setaffinity(0, asked.cores)  # inherited by all servers
    with tempfile.TemporaryDirectory() as scratch, Keeper(asked.threads, asked.logs) as keeper:
        bench = Bench(keeper, _contenders(keeper, asked, Path(scratch)), asked.tokens)
        same, measured = bench.warm_up(), []
        for load, requests in loads(asked):
            measured += bench.measure(load, requests, asked.rounds)
            _save(asked, same, measured)  # what comes next takes minutes
    agreed = ", ".join(f"{name} {share:.0%}" for name, share in same.items())
    print(table(_head(asked), measured), f"\nThe same answers as {next(iter(same))}: {agreed}.")


def _save(asked: argparse.Namespace, same: dict[str, float], measured: list[Row]) -> None:
    results = {"settings": _head(asked), "same_answers": same, "rows": [asdict(row) for row in measured]}
    write_json(asked.json, results)
    if asked.plot:
        plot(measured, asked.plot)


def _head(asked: argparse.Namespace) -> str:
    lengths = f"{asked.rounds} rounds; answers of {asked.tokens} tokens; {asked.dtype}"
    place = f"{torch.cuda.get_device_name()} and {processor()}" if asked.device == "cuda" else processor()
    model = asked.geometry or "a small model"
    return f"{place}, {asked.threads} threads a server; {model}; {lengths}"


def parsed() -> argparse.Namespace:
    parser = options(__doc__)
    add = parser.add_argument
    add("--rivals", type=several(one_of(RIVALS)), default=RIVALS, help=f"of {','.join(RIVALS)}")
    add("--budgets", type=several(kept_tokens), default=("all", "128", "64", "32"), help="of this service")
    add("--clients", type=several(at_least(0)), default=(1, 8, 32), help="closed loops; none: 0")
    add("--rates", type=several(_rate), default=(), help="open loops: requests a second")
    add("--requests", type=at_least(1), default=6, help="of each side in each round, at least; and at least")
    told = f"so many of each client: with fewer than {AGAIN} a load is told as requests at once"
    add("--waves", type=at_least(1.0), default=AGAIN, help=told)
    add("--rounds", type=at_least(1), default=3)
    add("--tokens", type=at_least(2), default=4, help="of each answer")
    add("--geometry", choices=sorted(SINGLE), help="the checkpoint's; default: a small one")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: beside `--rivals transformers` alone")
    add(
        "--max-batch",
        type=at_least(1),
        default=8,
        help="requests that this service and LitServe take at once",
    )
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="that all sides compute in")
    add("--threads", type=at_least(1), default=2, help="of each server")
    add("--cores", type=several(at_least(0)), help="all of them run on these; default: those of this process")
    add("--cache", type=Path, default=LibrarySettings().cache_dir / "benchmarks")
    add("--vllm-python", type=Path, help="of an environment that has vLLM already")
    add("--litserve-python", type=Path, help="of one that has LitServe, torch and transformers")
    add("--logs", type=Path, default=Path(tempfile.gettempdir()) / "prismprune-serving")
    asked = parser.parse_args()
    if asked.device != "cpu" and set(asked.rivals) - {"transformers"}:
        parser.error("vLLM and LitServe are compared on the CPU: on another device ask --rivals transformers")
    if not any(asked.clients) and not asked.rates:
        parser.error("without clients and rates nothing is asked")
    if asked.cores and set(asked.cores) - os.sched_getaffinity(0):
        parser.error("--cores names some that this process may not use")
    return asked


def _rate(text: str) -> float:
    """Requests a second; of fewer nobody would see the end."""
    return at_least(0.001)(text)


def _contenders(keeper: Keeper, asked: argparse.Namespace, scratch: Path) -> list[Contender]:
    """All sides, started and ready, this service once for each of its budgets."""
    name = "-".join(filter(None, (FOLDER, asked.geometry)))
    model = checkpoint(asked.cache / name, asked.geometry, asked.device)
    cores = sorted(os.sched_getaffinity(0))[: asked.threads]
    makers: dict[str, Callable[[], Rival]] = {
        "transformers": lambda: TransformersServe(str(model.transformers), asked.dtype, asked.device),
        "vllm": lambda: VllmCpu(
            str(model.published()),
            asked.vllm_python or vllm_cpu.environment(asked.cache).ready(),
            cores,
            asked.dtype,
        ),
        "litserve": lambda: LitServePlain(
            str(model.transformers),
            asked.litserve_python or litserve_plain.environment(asked.cache).ready(),
            asked.dtype,
            asked.max_batch,
        ),
    }
    rivals: list[Rival] = [makers[name]() for name in asked.rivals]
    contenders = [Contender(server, server.rival.name, {}) for server in map(keeper.start, rivals)]
    ours = keeper.start(
        PrismPrune(str(model.transformers), scratch, asked.logs, asked.dtype, asked.device, asked.max_batch)
    )
    budgets = [budget if budget == "all" else int(budget) for budget in asked.budgets]
    return contenders + [Contender(ours, f"prismprune {each}", {"token_budget": each}) for each in budgets]


def loads(asked: argparse.Namespace) -> list[tuple[Load, int]]:
    """And the requests of each side in a round of each."""
    found = [_of_clients(clients, asked) for clients in asked.clients if clients]
    return found + [(Load("open", rate), asked.requests) for rate in asked.rates]


def _of_clients(clients: int, asked: argparse.Namespace) -> tuple[Load, int]:
    requests = max(asked.requests, round(asked.waves * clients))
    return Load("closed" if requests >= AGAIN * clients else "burst", clients), requests


@dataclass
class Bench:
    """The sides, and how long their answers are. No two rounds show the same picture."""

    keeper: Keeper
    contenders: Sequence[Contender]
    tokens: int
    _seed: int = 0

    def warm_up(self) -> dict[str, float]:
        """Let every side answer the same questions; how many of each side's answers are the first one's."""
        contents, said = questions(SAME, self._seeds()), {}
        for contender in self.contenders:
            one = asyncio.run(closed_loop(contender, contents, 1, self.tokens))
            two = asyncio.run(closed_loop(contender, questions(SAME, self._seeds()), SAME, self.tokens))
            said[contender.name] = [answer.text for answer in one.answers]
            self._say(f"warm, {two.per_s:.2f}/s", contender)
        first = next(iter(said.values()))
        return {name: statistics.mean(map(operator.eq, own, first)) for name, own in said.items()}

    def measure(self, load: Load, requests: int, rounds: int) -> list[Row]:
        """Rounds of all sides in turn."""
        measured: dict[str, list[Round]] = {contender.name: [] for contender in self.contenders}
        for number in range(rounds):
            seed = self._seeds()
            for place in range(len(self.contenders)):
                contender = self.contenders[(place + number) % len(self.contenders)]
                measured[contender.name].append(self._round(contender, load, requests, seed))
        return rows(load, measured)

    def _round(self, contender: Contender, load: Load, requests: int, seed: int) -> Round:
        contents = questions(requests, seed)
        contender.server.await_readiness()
        if not at_rest([each.server for each in self.contenders]):
            self._say("asked while it still works", contender)
        if load.way == "open":
            loop = open_loop(contender, contents, load.level, self.tokens, seed)
        else:
            loop = closed_loop(contender, contents, int(load.level), self.tokens)
        with self.keeper.alone(contender.server):
            done = asyncio.run(loop)
        cost = f"{done.usage.cpu_s / len(done.answers):.2f} processor seconds an answer"
        self._say(f"{load}: {done.per_s:.2f}/s, {cost}", contender)
        return done

    def _seeds(self) -> int:
        self._seed += 100_000
        return self._seed

    @staticmethod
    def _say(what: str, contender: Contender) -> None:
        print(f"{contender.name}: {what}", file=sys.stderr)


if __name__ == "__main__":
    main()
