"""The Grafana dashboards as data: what each panel asks, in the form that Prometheus takes."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

DIRECTORY = Path(__file__).parent / "dashboards"
_LABEL = re.compile(r"{{\s*(\w+)\s*}}")


@dataclass(frozen=True, slots=True)
class Target:
    """One query of a panel and the template of its legend."""

    expr: str
    legend: str

    def concrete(self, *, model: str = ".*", interval: str = "1m") -> str:
        """The query with Grafana's variables filled in."""
        return self.expr.replace("$__rate_interval", interval).replace("$model", model)

    @property
    def legend_labels(self) -> set[str]:
        return set(_LABEL.findall(self.legend))

    def name(self, labels: Mapping[str, str]) -> str:
        """The legend of one series."""
        return _LABEL.sub(lambda found: labels.get(found[1], ""), self.legend).strip()


@dataclass(frozen=True, slots=True)
class Panel:
    """`unit` is Grafana's name of it: `s`, `bytes`, `percentunit`, `reqps`, `short`."""

    title: str
    unit: str
    kind: str
    stacked: bool
    targets: tuple[Target, ...]


@dataclass(frozen=True, slots=True)
class Dashboard:
    """The panels of one file, in reading order."""

    uid: str
    title: str
    panels: tuple[Panel, ...]


def load(path: Path) -> Dashboard:
    """The dashboard of one JSON file."""
    body = json.loads(path.read_text())
    return Dashboard(body["uid"], body["title"], tuple(map(_panel, body["panels"])))


def all_dashboards() -> tuple[Dashboard, ...]:
    return tuple(map(load, sorted(DIRECTORY.glob("*.json"))))


def _panel(body: Mapping[str, Any]) -> Panel:
    defaults = body["fieldConfig"]["defaults"]
    return Panel(
        title=body["title"],
        unit=defaults["unit"],
        kind=body["type"],
        stacked=defaults.get("custom", {}).get("stacking", {}).get("mode") == "normal",
        targets=tuple(Target(each["expr"], each["legendFormat"]) for each in body["targets"]),
    )
