"""The paper's ablations of PrismPrune, on the demo model: a table each, and a run can be cut off and resumed.

pool: how many times K_div the candidate pool holds (the paper's Table 4). share: the salient part of the
budget (its Table 6). start: the first diverse token. block: the tower's block whose attention is read; the
features stay those of the block that feeds the projector.

    python -m benchmarks.ablations --pictures 200 --budgets 64 32 --results ablations/
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from rich.console import Console
from rich.progress import track

from benchmarks._measure import add_threads
from prismprune import PrunedVLM
from prismprune.demo.evaluate import SETTINGS, packed, subjects
from prismprune.evaluation.compare import OneReading, compare
from prismprune.evaluation.report import UNPRUNED, Report, Setting, Tally
from prismprune.selection.fps import FPS_STARTS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from prismprune.evaluation.subjects import Subject
    from prismprune.families.base import Family
    from prismprune.families.llava import LlavaFamily
    from prismprune.media import Clip, Picture

VARIANTS: dict[str, list[str]] = {
    "pool": [f"prism:pool_factor={factor}" for factor in ("2", "4", "8", "all")],
    "share": [f"prism:salient_share={share}" for share in (0, 0.25, 0.5, 0.75, 1)],
    "start": [f"prism:fps_start={start}" for start in FPS_STARTS],
}
BLOCK = "block"


def main() -> None:
    arguments = parsed()
    torch.set_num_threads(arguments.threads)
    arguments.results.mkdir(parents=True, exist_ok=True)
    bench = Bench(PrunedVLM.from_pretrained(arguments.model), arguments)
    for name in arguments.only:
        report = bench.blocks() if name == BLOCK else bench.variants(name)
        report.show()
        report.write_csv(arguments.results / f"{report.suite}.csv")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="prism-demo", help="the demo, or a directory like it")
    parser.add_argument("--suite", choices=tuple(SETTINGS), default="scenes")
    parser.add_argument("--pictures", type=int, default=50)
    parser.add_argument("--budgets", type=int, nargs="+", default=[64])
    parser.add_argument("--only", choices=(*VARIANTS, BLOCK), nargs="+", default=[*VARIANTS, BLOCK])
    parser.add_argument(
        "--blocks", type=int, nargs="+", help="counted from 0; default: all up to the used one"
    )
    parser.add_argument("--results", type=Path, required=True, help="folder of what is done, to resume from")
    add_threads(parser)
    return parser.parse_args()


class Bench:
    """One model, one set of questions, one folder of results."""

    def __init__(self, vlm: PrunedVLM, arguments: argparse.Namespace) -> None:
        self.vlm = vlm
        self.arguments = arguments
        self.subjects: list[Subject] = list(subjects(arguments.suite, arguments.pictures))

    def variants(self, name: str) -> Report:
        """One option of `prism`, over its values."""
        settings: list[Setting] = [(method, k) for method in VARIANTS[name] for k in self.arguments.budgets]
        return self._run(name, [UNPRUNED, *settings])

    def blocks(self) -> Report:
        """`prism` on the attention of other blocks."""
        used = cast("LlavaFamily", self.vlm._family)._block  # noqa: SLF001  # no public name: only an ablation asks
        report = self._run("unpruned", [UNPRUNED])
        tallies: dict[Setting, Tally] = dict(report.tallies)
        settings: list[Setting] = [("prism", k) for k in self.arguments.budgets]
        for block in self.arguments.blocks or range(used + 1):
            report = self._run(f"{BLOCK} {block}", settings, reader=partial(OtherAttention, block=block))
            tallies |= {(f"block {block}", k): report.tallies["prism", k] for k in self.arguments.budgets}
        return replace(report, suite=f"{self.arguments.suite} {BLOCK}", tallies=tallies)

    def _run(self, name: str, settings: list[Setting], **options: Any) -> Report:
        """The last report; a block's results have a file of their own, as its attention has no other name."""
        file = self.arguments.results / f"{name if options else self.arguments.suite}.jsonl"
        reports: Iterable[Report] = compare(
            self.vlm,
            f"{self.arguments.suite} {name}",
            self.subjects,
            settings,
            marker=packed(self.vlm),
            results=file,
            **options,
        )
        *_, last = track(reports, total=len(self.subjects), description=name, console=Console(stderr=True))
        return last


class OtherAttention(OneReading):
    """The tower's features as ever, and the attention of another block."""

    def __init__(self, family: Family, media: Picture | Clip, *, block: int) -> None:
        super().__init__(family, media)
        other = cast("LlavaFamily", copy.copy(family))
        other._block = block  # noqa: SLF001  # as above
        attention = [other.read(group).attention for group in self.pixels]
        self.readings = [
            replace(reading, attention=scores)
            for reading, scores in zip(self.readings, attention, strict=True)
        ]


if __name__ == "__main__":
    main()
