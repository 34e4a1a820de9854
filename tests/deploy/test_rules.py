"""The recording and alerting rules: of metrics that exist, each with a runbook entry and a test."""

from __future__ import annotations

import re
import subprocess
from typing import TYPE_CHECKING

import promql_parser as promql
import pytest
import yaml

from monitoring.rules import RESOURCE, RULES, resource
from service import errors
from tests.deploy.conftest import (
    ROOT,
    TARGET_LABELS,
    Document,
    exported,
    program,
    recorded,
    rendered,
    rules,
    selectors,
)
from worker.errors import MediaNotFoundError
from worker.metrics import FAILURES

if TYPE_CHECKING:
    from pathlib import Path

ALERTS = [rule for rule in rules() if "alert" in rule]


def rule_name(rule: Document) -> str:
    return str(rule.get("alert") or rule["record"])


@pytest.mark.parametrize("rule", rules(), ids=rule_name)
def test_a_rule_asks_for_what_is_exported(rule: Document) -> None:
    """Every metric is one that the code exports or a rule records, with labels that it has."""
    found = selectors(rule["expr"])
    assert found
    for each in found:
        assert each.name in exported().keys() | recorded(), each.name
        if each.name in exported():
            assert each.labels <= exported()[each.name] | TARGET_LABELS


def test_refusals_are_asked_for_by_reasons_that_exist() -> None:
    """A rule that names a refusal's reason names the slug of an error."""
    slugs = {each.slug for each in vars(errors).values() if isinstance(each, type) and hasattr(each, "slug")}
    reasons = reasons_of("prismprune_admission_rejections_total")
    assert reasons
    assert reasons <= slugs


def test_failed_jobs_are_counted_but_for_their_callers_faults() -> None:
    """The rule leaves out every 4xx that a job may end with, but for media that the store has lost."""
    refused = {each.slug for each in FAILURES if 400 <= each.status < 500}
    assert reasons_of("prismprune_job_failures_total") == refused - {MediaNotFoundError.slug}


def reasons_of(name: str) -> set[str]:
    """Values of `reason` by which the rules match the metric `name`."""
    found = [each for rule in rules() for each in selectors(rule["expr"]) if each.name == name]
    return {reason for each in found for reason in each.values["reason"].split("|")}


def test_records_are_named_by_level_metric_and_operation() -> None:
    """As Prometheus advises: `level:metric:operations`."""
    assert all(re.fullmatch(r"prismprune:[a-z_]+:[a-z0-9_]+", name) for name in recorded())


@pytest.mark.parametrize("rule", ALERTS, ids=rule_name)
def test_an_alert_says_what_to_do(rule: Document) -> None:
    """Severity, summary, description, and an entry of its own in the runbook."""
    assert rule["labels"]["severity"] in ("page", "warn")
    assert set(rule["annotations"]) == {"summary", "description", "runbook"}
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    assert anchor == rule["alert"].lower()
    assert f"\n### {rule['alert']}\n" in (ROOT / page).read_text()


def test_the_runbook_knows_no_other_alerts() -> None:
    """An entry whose alert is gone misleads."""
    headings = re.findall(r"^### (PrismPrune\w+)$", (ROOT / "docs/runbook.md").read_text(), re.MULTILINE)
    assert sorted(headings) == sorted(rule["alert"] for rule in ALERTS)


@pytest.mark.parametrize("rule", ALERTS, ids=rule_name)
def test_an_alert_is_shown_to_fire_and_not_to(rule: Document) -> None:
    """`rules_test.yml` has a case of each, whether or not promtool is here to run them."""
    tests = yaml.safe_load((ROOT / "monitoring/rules_test.yml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"] if case["alertname"] == rule["alert"]]
    assert any(case["exp_alerts"] for case in cases)
    assert any(not case["exp_alerts"] for case in cases)


@pytest.mark.parametrize("name", sorted(recorded()))
def test_a_record_is_shown_to_have_its_value(name: str) -> None:
    """`rules_test.yml` asks for each of them, besides what the alerts make of it."""
    tests = yaml.safe_load((ROOT / "monitoring/rules_test.yml").read_text())["tests"]
    asked = [each["expr"] for test in tests for each in test.get("promql_expr_test", ())]
    assert any(each.name == name for expr in asked for each in selectors(expr))


def test_the_operators_resource_holds_the_same_rules() -> None:
    """`python -m monitoring.rules` was run after the last change, and the overlay carries the result."""
    assert RESOURCE.read_text() == resource()
    (carried,) = (each for each in rendered("gpu") if each["kind"] == "PrometheusRule")
    assert carried["spec"]["groups"] == yaml.safe_load(RULES.read_text())["groups"]


def test_autoscaling_counts_waiting_and_running_jobs() -> None:
    """A busy worker is not scaled away; each model's trigger counts that model's jobs alone."""
    deployments = {each["metadata"]["name"]: each for each in rendered("gpu") if each["kind"] == "Deployment"}
    scaled = [each["spec"] for each in rendered("gpu") if each["kind"] == "ScaledObject"]
    workers = {name for name in deployments if name.startswith("worker-")}
    assert len(workers) > 1
    assert {each["scaleTargetRef"]["name"] for each in scaled} == workers
    for each in scaled:
        container = deployments[each["scaleTargetRef"]["name"]]["spec"]["template"]["spec"]["containers"][0]
        (model,) = (entry["value"] for entry in container["env"] if entry["name"] == "PRISM_MODEL")
        (trigger,) = each["triggers"]
        found = selectors(trigger["metadata"]["query"])
        assert {"prismprune_queue_depth", "prismprune_jobs_running"} <= {each.name for each in found}
        assert {each.name for each in found} <= exported().keys()
        assert all(each.values == {"model": model} for each in found)
        assert isinstance(promql.parse(trigger["metadata"]["query"]), promql.BinaryExpr)
        assert each["minReplicaCount"] >= 1


def test_autoscaling_without_numbers_leaves_the_workers_as_they_are() -> None:
    """A query that gives nothing is an error, and in error no worker is taken away and none is added."""
    for each in (each["spec"] for each in rendered("gpu") if each["kind"] == "ScaledObject"):
        (trigger,) = each["triggers"]
        assert trigger["metadata"]["ignoreNullValues"] == "false"
        assert trigger["metricType"] == "AverageValue"  # KEDA falls back for no other
        assert each["fallback"]["behavior"] == "currentReplicasIfHigher"
        assert each["fallback"]["replicas"] == each["minReplicaCount"]


FRONT_END = {"prismprune_queue_depth": 12, "prismprune_workers": 1}
COUNTERS = {"prismprune_requests_total": 5}


@pytest.mark.parametrize(
    ("series", "jobs"),
    [
        pytest.param(FRONT_END | COUNTERS | {"prismprune_jobs_running": 8}, 20, id="a warm worker"),
        pytest.param(FRONT_END | COUNTERS, 12, id="the first worker loads its model"),
        pytest.param(FRONT_END | {"prismprune_workers": 0}, 12, id="no worker has come up yet"),
        pytest.param(FRONT_END, None, id="workers that nobody scrapes"),
        pytest.param(COUNTERS | {"prismprune_jobs_running": 8}, None, id="front ends that nobody scrapes"),
    ],
)
def test_autoscaling_counts_from_a_cold_start_and_takes_nothing_for_zero(
    tmp_path: Path, series: dict[str, int], jobs: int | None
) -> None:
    """Each model's query has a number wherever it is known, and none where data are missing."""
    scaled = [each["spec"] for each in rendered("gpu") if each["kind"] == "ScaledObject"]
    queries = [each["triggers"][0]["metadata"]["query"] for each in scaled]
    models = [selectors(query)[0].values["model"] for query in queries]
    given = [(f'{name}{{model="{model}"}}', number) for name, number in series.items() for model in models]
    asked = [
        {
            "expr": query,
            "eval_time": "5m",
            "exp_samples": [] if jobs is None else [{"labels": "{}", "value": jobs}],
        }
        for query in queries
    ]
    test = {
        "interval": "1m",
        "input_series": [{"series": name, "values": f"{number}x10"} for name, number in given],
        "promql_expr_test": asked,
    }
    (tmp_path / "test.yml").write_text(yaml.safe_dump({"tests": [test]}))
    command = [program("promtool"), "test", "rules", str(tmp_path / "test.yml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_accepts_the_configuration() -> None:
    """Prometheus itself would start with it."""
    command = [program("promtool"), "check", "config", "monitoring/prometheus.yml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_promtool_sees_every_alert_fire_and_rest() -> None:
    """The unit tests of the rules."""
    command = [program("promtool"), "test", "rules", "monitoring/rules_test.yml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
