"""`python -m monitoring.rules`: writes Kubernetes' PrometheusRule from `rules.yml`.

Prometheus reads that file itself; the operator's resource must hold the rules, and kustomize cannot put them
there.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[1]
RULES = ROOT / "monitoring" / "rules.yml"
RESOURCE = ROOT / "k8s" / "components" / "monitoring" / "rules.yaml"
HEAD = """\
# Written by `python -m monitoring.rules` from monitoring/rules.yml.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: prismprune
spec:
"""


def resource() -> str:
    """The resource as YAML; the rules stand in it as they stand in their file, comments included."""
    rules = RULES.read_text()
    return HEAD + textwrap.indent(rules[rules.index("groups:") :], "  ")


if __name__ == "__main__":
    RESOURCE.write_text(resource())
