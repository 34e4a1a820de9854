"""Every panel and every rule, asked of a real Prometheus that scrapes a real `make serve`."""

from __future__ import annotations

import io
import math
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import httpx
import pytest
import yaml
from PIL import Image

from monitoring.panels import Dashboard, Panel, all_dashboards
from service.serve.machine import free_ports
from tests.deploy.conftest import ROOT, exported, program, recorded, rules
from tests.e2e.conftest import Tree, checkpoint, serving, wait_until  # noqa: F401 (a fixture)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.timeout(300)
INTERVAL = "20s"


@dataclass(frozen=True, slots=True)
class Prometheus:
    """A running one."""

    url: str

    def values(self, query: str) -> list[float]:
        """What `query` gives now."""
        response = httpx.get(f"{self.url}/api/v1/query", params={"query": query}, trust_env=False)
        assert response.status_code == 200, (query, response.text)
        return [float(each["value"][1]) for each in response.json()["data"]["result"]]

    def answers(self, query: str) -> bool:
        """Whether `query` gives at least one finite value."""
        return any(math.isfinite(value) for value in self.values(query))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory, checkpoint: str) -> Iterator[Tree]:  # noqa: F811
    """`make serve` with a tiny model."""
    with serving(tmp_path_factory.mktemp("serve"), PRISM_MODEL=checkpoint) as running:
        yield running


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory, tree: Tree) -> Iterator[Prometheus]:
    """Our rules, evaluated every second."""
    directory, (port,) = tmp_path_factory.mktemp("prometheus"), free_ports(1)
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(ROOT / "monitoring/rules.yml")],
        "scrape_configs": [
            {"job_name": "prismprune", "static_configs": [{"targets": [f"127.0.0.1:{tree.port}"]}]}
        ],
    }
    (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
    command = [
        program("prometheus"),
        f"--config.file={directory / 'prometheus.yml'}",
        f"--storage.tsdb.path={directory / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    running = Prometheus(f"http://127.0.0.1:{port}")
    try:
        wait_until(lambda: ready(running) or process.poll() is not None)
        assert process.poll() is None, (directory / "log").read_text()
        yield running
    finally:
        process.terminate()
        process.wait(30)


def ready(prometheus: Prometheus) -> bool:
    try:
        return httpx.get(f"{prometheus.url}/-/ready", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def ask(tree: Tree) -> None:
    """A pruned answer, an unpruned one, and a refusal."""
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(picture, "PNG")
    for budget, status in (("4", 200), ("all", 200), ("0", 422)):
        response = httpx.post(
            f"{tree.url}/v1/answer",
            data={"question": "What is this?", "token_budget": budget, "max_new_tokens": "2"},
            files={"image": picture.getvalue()},
            timeout=60,
            trust_env=False,
        )
        assert response.status_code == status, response.text


@pytest.fixture(scope="module")
def busy(tree: Tree, prometheus: Prometheus) -> Prometheus:
    """After some traffic, of which the last requests came between two scrapes."""

    def seen() -> bool:
        ask(tree)
        return prometheus.answers(f"rate(prismprune_visual_tokens_kept_sum[{INTERVAL}]) > 0")

    wait_until(seen)
    return prometheus


@pytest.mark.parametrize(
    ("dashboard", "panel"),
    [
        pytest.param(board, panel, id=f"{board.uid}: {panel.title}")
        for board in all_dashboards()
        for panel in board.panels
    ],
)
def test_a_panel_has_data(busy: Prometheus, tree: Tree, dashboard: Dashboard, panel: Panel) -> None:
    """Each of its queries gives a finite value; memory is the device's where there is no CUDA."""
    for target in panel.targets:
        query = target.concrete(interval=INTERVAL)

        def found(query: str = query) -> bool:
            ask(tree)
            return busy.answers(query)

        if not busy.answers(query):
            wait_until(found, 30)


def test_the_rules_are_evaluated_without_errors(busy: Prometheus) -> None:
    """Every one; those that record something to divide by have recorded it, and no alert fires."""

    def health() -> set[str]:
        body = httpx.get(f"{busy.url}/api/v1/rules", trust_env=False).json()
        return {rule["health"] for group in body["data"]["groups"] for rule in group["rules"]}

    wait_until(lambda: health() == {"ok"})
    wait_until(lambda: all(busy.values(name) for name in recorded()))
    assert busy.values('ALERTS{alertstate="firing"}') == []
    assert len(rules()) > len(recorded())


def test_the_pages_export_what_the_code_declares(tree: Tree) -> None:
    """One scrape of `make serve` shows families of front end and worker, and none that nobody declared."""
    page = httpx.get(f"{tree.url}/metrics", trust_env=False).text
    families = {line.split()[2] for line in page.splitlines() if line.startswith("# TYPE prismprune_")}
    own = {name for name in families if not name.endswith("_created")}
    assert own <= exported().keys()
    assert {"prismprune_http_request_duration_seconds", "prismprune_requests_total"} <= own


def test_panels_are_drawn(busy: Prometheus, tmp_path: Path) -> None:
    """The command writes a picture a dashboard."""
    command = [sys.executable, "-m", "monitoring.render", "--minutes", "1", "--into", str(tmp_path)]
    done = subprocess.run(
        [*command, "--prometheus", busy.url], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    written = sorted(path.stem for path in tmp_path.glob("*.png"))
    assert written == sorted(board.uid for board in all_dashboards())
    for path in tmp_path.glob("*.png"):
        with Image.open(path) as picture:
            assert len(picture.convert("L").getcolors(256) or ()) > 16
