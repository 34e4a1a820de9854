"""The Grafana dashboards: of metrics and labels that exist, provisioned and carried the same everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from monitoring.panels import DIRECTORY, Dashboard, Panel, Target, all_dashboards
from tests.deploy.conftest import ROOT, TARGET_LABELS, exported, grouped_by, rendered, selectors

if TYPE_CHECKING:
    from tests.deploy.conftest import Compose

TARGETS = [
    pytest.param(target, id=f"{board.uid}: {panel.title}: {target.legend}")
    for board in all_dashboards()
    for panel in board.panels
    for target in panel.targets
]
PANELS = [
    pytest.param(panel, id=f"{board.uid}: {panel.title}")
    for board in all_dashboards()
    for panel in board.panels
]
FILES = sorted(DIRECTORY.glob("*.json"))


@pytest.mark.parametrize("target", TARGETS)
def test_a_query_asks_for_what_is_exported(target: Target) -> None:
    """Metrics and labels are those of the code; the legend names labels that the query leaves."""
    found = selectors(target.concrete())
    assert found
    for each in found:
        assert each.labels <= exported()[each.name] | TARGET_LABELS
    left = grouped_by(target.concrete())
    assert target.legend_labels <= left | TARGET_LABELS
    assert left - {"le"} <= set.union(*(set(exported()[each.name]) for each in found)) | TARGET_LABELS


@pytest.mark.parametrize("panel", PANELS)
def test_a_panel_is_whole(panel: Panel) -> None:
    """A title, a query, a unit, a kind that the renderer and the tests know."""
    assert panel.title
    assert panel.targets
    assert panel.unit in ("s", "bytes", "percentunit", "reqps", "short")
    assert panel.kind in ("timeseries", "table")


@pytest.mark.parametrize("dashboard", all_dashboards(), ids=lambda board: board.uid)
def test_panels_do_not_overlap(dashboard: Dashboard) -> None:
    """Every cell of the 24 columns belongs to one panel; ids and titles are unique."""
    (body,) = (
        json.loads(path.read_text()) for path in FILES if json.loads(path.read_text())["uid"] == dashboard.uid
    )
    cells = [
        (x, y)
        for at in (panel["gridPos"] for panel in body["panels"])
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(cells) == len(set(cells))
    assert all(x < 24 for x, _ in cells)
    for key in ("id", "title"):
        assert len({panel[key] for panel in body["panels"]}) == len(body["panels"])


def test_every_exported_family_is_on_a_dashboard() -> None:
    """What is measured can be seen, but for what only `make serve`'s one scrape tells."""
    targets = [target for board in all_dashboards() for panel in board.panels for target in panel.targets]
    shown = {each.name for target in targets for each in selectors(target.concrete())}
    suffixes = ("_created", "_bucket", "_count", "_sum", "_total")
    families = {name for name in exported() if not name.endswith(suffixes)}
    unseen = {name for name in families if not any(each.startswith(name) for each in shown)}
    assert unseen == {"prismprune_metrics_upstream_up"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_data_source_and_model_are_chosen_by_variables(path: Path) -> None:
    """No dashboard is tied to one Grafana; all models are shown at first."""
    body = json.loads(path.read_text())
    source, model = body["templating"]["list"]
    assert (source["name"], source["type"]) == ("datasource", "datasource")
    assert (model["name"], model["allValue"]) == ("model", ".*")
    sources = {panel["datasource"]["uid"] for panel in body["panels"]}
    assert sources | {each["datasource"]["uid"] for p in body["panels"] for each in p["targets"]} == {
        "${datasource}"
    }


@pytest.mark.parametrize("overlay", ["cpu-demo", "gpu"])
def test_kubernetes_carries_the_same_files(overlay: str) -> None:
    """As one ConfigMap with the label that Grafana's sidecar looks for."""
    (carried,) = (
        each
        for each in rendered(overlay)
        if each["kind"] == "ConfigMap" and each["metadata"]["name"] == "prismprune-dashboards"
    )
    assert carried["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert carried["data"] == {path.name: path.read_text() for path in FILES}


def test_compose_provisions_grafana_from_the_same_files(compose: Compose) -> None:
    """Provider, data source and home dashboard point to what is mounted and running."""
    services = compose()
    mounts = dict(volume.split(":")[:2] for volume in services["grafana"]["volumes"])
    assert mounts["./monitoring/dashboards"]
    provider = yaml.safe_load((ROOT / "monitoring/provisioning/dashboards/prismprune.yml").read_text())
    assert provider["providers"][0]["options"]["path"] == mounts["./monitoring/dashboards"]
    source = yaml.safe_load((ROOT / "monitoring/provisioning/datasources/prometheus.yml").read_text())
    assert source["datasources"][0]["url"] == "http://prometheus:9090"
    home = Path(services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (DIRECTORY / home.name).exists()
    assert str(home.parent) == mounts["./monitoring/dashboards"]
