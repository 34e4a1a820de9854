"""What the deployment's files say, and what the code says that they must agree with."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import promql_parser as promql
import pytest
import yaml
from prometheus_client import Histogram
from prometheus_client.metrics import MetricWrapperBase

from prismprune.settings import LibrarySettings
from service.metrics import Metrics
from service.settings import ServiceSettings
from tests.present import present
from worker.metrics import WorkerMetrics
from worker.settings import WorkerSettings
from worker.tasks import VIDEOS_AT_ONCE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Compose = Callable[..., dict[str, Any]]

ROOT = Path(__file__).parents[2]
OVERLAYS = ("cpu-demo", "gpu")
Settings = ServiceSettings | WorkerSettings
SETTINGS: dict[str, type[Settings]] = {"service": ServiceSettings, "worker": WorkerSettings}
TARGET_LABELS = frozenset(("job", "instance"))
"""What Prometheus itself adds to every series."""
Document = dict[str, Any]


def variables(component: str) -> set[str]:
    """The environment names that `service` or `worker` has; the worker's are the library's too."""
    library = LibrarySettings.model_fields if component == "worker" else ()
    return {f"PRISM_{field.upper()}" for field in (*SETTINGS[component].model_fields, *library)}


def accepted(component: str, environment: dict[str, str]) -> Settings:
    """The settings that a container with `environment` runs with; raises where it would not start."""
    settings = SETTINGS[component]
    told: dict[str, Any] = {name.removeprefix("PRISM_").lower(): each for name, each in environment.items()}
    return settings(**{name: each for name, each in told.items() if name in settings.model_fields and each})


def program(name: str) -> str:
    """The path of a program that pip cannot bring; without it a test is skipped, but fails in a CI."""
    found, missing = shutil.which(name), f"{name} is not installed (Debian: apt-get install prometheus)"
    if found is None and os.environ.get("CI"):
        pytest.fail(missing)
    if found is None:
        pytest.skip(missing)
    return found


def size(text: str) -> int:
    """Bytes of `700mb`, `1g` or `4Gi`, as Valkey, Docker and Kubernetes write powers of two."""
    number, unit = present(re.fullmatch(r"(\d+)([kmg]?)(?:b|i)?", text.lower())).groups()
    return int(number) << {"": 0, "k": 10, "m": 20, "g": 30}[unit]


def room_for_videos(worker: Settings) -> tuple[int, int]:
    """Bytes of disk and of memory that a worker needs for the largest videos it may hold or decode at once.

    On disk also a GiB for compiled code; in memory 850 MiB a decoder and the process that reads it, 1.5 GiB
    for Python, torch and the demo model, and what the settings allow for copies and caches.
    """
    assert isinstance(worker, WorkerSettings)
    caches = worker.packed_weights_bytes + worker.media_cache_bytes + worker.prefix_cache_bytes
    disk = worker.concurrency * worker.max_video_bytes + size("1g")
    return disk, min(worker.concurrency, VIDEOS_AT_ONCE) * size("850m") + size("1536m") + caches


def keeps_accepted_jobs(command: list[str], memory_limit: str) -> bool:
    """Whether a broker has jobs on disk before it says so, evicts none, and refuses new ones in time.

    A quarter to a third of its memory is left, for buffers and for the copy while the append-only file is
    rewritten.
    """
    told = dict(zip(command[1::2], command[2::2], strict=True))
    kept = [told[name] for name in ("--appendonly", "--appendfsync", "--maxmemory-policy")]
    used = size(told["--maxmemory"]) / size(memory_limit)
    return kept == ["yes", "always", "noeviction"] and 2 / 3 < used < 3 / 4


@cache
def rendered(overlay: str) -> tuple[Document, ...]:
    """Every document of an overlay, as `kubectl apply -k` would send it."""
    return kustomized(ROOT / "k8s" / "overlays" / overlay)


def kustomized(directory: Path) -> tuple[Document, ...]:
    """Every document that the kustomization in `directory` gives."""
    command = [str(Path(sys.executable).with_name("kubectl")), "kustomize", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return tuple(document for document in yaml.safe_load_all(done.stdout) if document)


@pytest.fixture(params=OVERLAYS)
def documents(request: pytest.FixtureRequest) -> tuple[Document, ...]:
    """Each overlay in turn."""
    return rendered(request.param)


@cache
def exported() -> dict[str, frozenset[str]]:
    """Every sample that front end and workers can expose, to its labels."""
    found: dict[str, frozenset[str]] = {}
    for registry in (Metrics().registry, WorkerMetrics("any").registry):
        for collector, names in registry._collector_to_names.items():
            assert isinstance(collector, MetricWrapperBase)
            labels = frozenset(collector._labelnames)
            for name in names:
                bucket = {"le"} if isinstance(collector, Histogram) and name.endswith("_bucket") else set()
                found[name] = labels | bucket
    return found


@cache
def recorded() -> frozenset[str]:
    """The names that the recording rules make."""
    return frozenset(rule["record"] for rule in rules() if "record" in rule)


@cache
def rules() -> tuple[Document, ...]:
    """Every rule, recording and alerting, in order."""
    groups = yaml.safe_load((ROOT / "monitoring/rules.yml").read_text())["groups"]
    return tuple(rule for group in groups for rule in group["rules"])


@dataclass(frozen=True, slots=True)
class Selector:
    """One metric in a query, and the labels it is matched by."""

    name: str
    labels: frozenset[str]
    values: dict[str, str]


def selectors(query: str) -> list[Selector]:
    """Every metric of `query`; raises ValueError where it is not PromQL."""
    return [
        Selector(
            present(node.name),
            frozenset(each.name for each in node.matchers.matchers),
            {each.name: each.value for each in node.matchers.matchers},
        )
        for node in nodes(promql.parse(query))
        if isinstance(node, promql.VectorSelector)
    ]


def nodes(node: Any) -> Iterator[Any]:
    """`node` and everything below it."""
    yield node
    for name in ("expr", "lhs", "rhs", "param", "vector_selector", "vs"):
        child = getattr(node, name, None)
        if isinstance(child, promql.Expr):
            yield from nodes(child)
    for child in getattr(node, "args", None) or ():
        yield from nodes(child)


def grouped_by(query: str) -> set[str]:
    """Labels that some aggregation of `query` groups by."""
    return {
        label
        for node in nodes(promql.parse(query))
        if isinstance(node, promql.AggregateExpr) and node.modifier is not None
        for label in node.modifier.labels
    }


def substituted(node: Any, environment: dict[str, str]) -> Any:
    """A part of a compose file as compose reads it where the user has set `environment` and nothing else."""

    def value(found: re.Match[str]) -> str:
        return environment.get(found["name"]) or found["default"] or ""

    if isinstance(node, dict):
        return {key: substituted(each, environment) for key, each in node.items()}
    if isinstance(node, list):
        return [substituted(each, environment) for each in node]
    variable = r"\$\{(?P<name>\w+)(?::-(?P<default>[^}]*)|:\?[^}]*)?\}"
    return re.sub(variable, value, node) if isinstance(node, str) else node


@pytest.fixture
def compose() -> Compose:
    """Reads compose files: the later ones' services over the earlier ones', as far as these files need it."""

    def read(*names: str, **environment: str) -> Document:
        merged: Document = {}
        for name in names or ("docker-compose.yml",):
            body = substituted(yaml.safe_load((ROOT / name).read_text()), environment)
            for service, own in body["services"].items():
                before = merged.setdefault(service, {})
                own_environment = before.get("environment", {}) | own.get("environment", {})
                merged[service] = before | own | ({"environment": own_environment} if own_environment else {})
        return merged

    return read
