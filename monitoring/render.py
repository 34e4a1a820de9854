"""`python -m monitoring.render`: draws each dashboard's panels, from a running Prometheus, into one PNG.

For pages that cannot show Grafana itself. Needs matplotlib (`prismprune[plots]`).
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter, date2num
from matplotlib.rcsetup import cycler
from matplotlib.ticker import EngFormatter, FuncFormatter, MultipleLocator, PercentFormatter

from monitoring.panels import Dashboard, Panel, all_dashboards

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.ticker import Formatter
    from matplotlib.typing import RcKeyType

COLUMNS = 2
POINTS = 240
KIB = 1024
LEGEND_CHARACTERS = 96
"""As many are as wide as a panel."""
_STYLE: dict[RcKeyType, Any] = {
    "axes.grid": True,
    "axes.prop_cycle": cycler(color=mpl.color_sequences["tab10"]),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "font.size": 9,
    "grid.alpha": 0.3,
    "legend.fontsize": 8,
    "legend.frameon": False,
}


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a panel; values are NaN where there was nothing to divide by."""

    name: str
    times: list[datetime]
    values: list[float]


@dataclass(frozen=True, slots=True)
class Source:
    """The last `minutes` of a Prometheus at `url`."""

    url: str
    minutes: float

    def read(self, panel: Panel) -> list[Series]:
        """Every series of the panel's queries. Raises `httpx.HTTPError`."""
        end = time.time()
        window = {"start": end - self.minutes * 60, "end": end, "step": max(1, self.minutes * 60 / POINTS)}
        found = []
        for target in panel.targets:
            response = httpx.get(
                f"{self.url}/api/v1/query_range",
                params={"query": target.concrete(), **window},
                timeout=30,
                trust_env=False,
            )
            response.raise_for_status()
            for each in response.json()["data"]["result"]:
                times, values = zip(*each["values"], strict=True)
                moments = [datetime.fromtimestamp(at, UTC) for at in times]
                name = target.name(each["metric"]) or " ".join(each["metric"].values())
                found.append(Series(name, moments, list(map(float, values))))
        return found


def draw(dashboard: Dashboard, source: Source, path: Path) -> None:
    """Writes one picture with every panel that is drawn over time."""
    panels = [panel for panel in dashboard.panels if panel.kind == "timeseries"]
    rows = -(-len(panels) // COLUMNS)
    with mpl.rc_context(_STYLE):
        figure, axes = plt.subplots(
            rows, COLUMNS, figsize=(13, 3 * rows), squeeze=False, layout="constrained"
        )
        figure.suptitle(dashboard.title, x=0.01, ha="left", fontsize=14, fontweight="bold")
        for axis, panel in zip(axes.flat, panels, strict=False):
            _draw_panel(axis, panel, source.read(panel))
        for unused in axes.flat[len(panels) :]:
            unused.set_visible(False)
        figure.savefig(path, dpi=110)
        plt.close(figure)


def _draw_panel(axis: Axes, panel: Panel, series: list[Series]) -> None:
    axis.set_title(panel.title)
    if panel.stacked and series:
        times = sorted({at for each in series for at in each.times})
        known = [dict(zip(each.times, each.values, strict=True)) for each in series]
        layers = [[_number(values.get(at, 0.0)) for at in times] for values in known]
        axis.stackplot(date2num(times), layers, labels=[each.name for each in series], alpha=0.75)
    else:
        for each in series:
            axis.plot(date2num(each.times), each.values, label=each.name, linewidth=1.4)
    axis.set_ylim(bottom=0)
    axis.yaxis.set_major_formatter(_formatter(panel.unit))
    if panel.unit == "bytes":  # round numbers of KiB, MiB, GiB
        axis.yaxis.set_major_locator(MultipleLocator(2.0 ** math.ceil(math.log2(axis.get_ylim()[1] / 4))))
    locator = AutoDateLocator(minticks=3, maxticks=9)
    axis.xaxis.set_major_locator(locator)
    axis.xaxis.set_major_formatter(ConciseDateFormatter(locator, show_offset=False))
    if series:
        columns = LEGEND_CHARACTERS // (6 + max(len(each.name) for each in series))
        ncols = min(4, max(1, columns))
        axis.legend(loc="upper left", bbox_to_anchor=(0, -0.1), ncols=ncols, handlelength=1)


def _number(value: float) -> float:
    """A stack cannot hold what is not a number."""
    return 0.0 if math.isnan(value) else value


def _formatter(unit: str) -> Formatter:
    if unit == "percentunit":
        return PercentFormatter(xmax=1)
    if unit == "bytes":
        return FuncFormatter(lambda value, _: _bytes(value))
    if unit == "s":
        return EngFormatter(unit="s")
    return FuncFormatter(lambda value, _: f"{value:g}{'/s' if unit == 'reqps' else ''}")


def _bytes(value: float) -> str:
    for prefix in ("", "Ki", "Mi", "Gi"):
        if abs(value) < KIB:
            return f"{value:.3g} {prefix}B"
        value /= KIB
    return f"{value:.3g} TiB"


def main() -> None:
    """Writes `<dashboard>.png` for each dashboard."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090", help="its URL")
    parser.add_argument("--minutes", type=float, default=15, help="how far back")
    parser.add_argument("--into", type=Path, default=Path("docs/dashboards"), help="where the pictures go")
    asked = parser.parse_args()
    mpl.use("agg")
    asked.into.mkdir(parents=True, exist_ok=True)
    for dashboard in all_dashboards():
        path = asked.into / f"{dashboard.uid}.png"
        draw(dashboard, Source(asked.prometheus.rstrip("/"), asked.minutes), path)
        sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
