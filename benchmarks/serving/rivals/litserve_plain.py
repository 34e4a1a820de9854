"""LitServe around plain transformers: what one writes in an afternoon, with its dynamic batching.

LitServe has an environment of its own, which sees ours behind it: the same torch and transformers.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.serving.environments import Environment, site_packages
from benchmarks.serving.servers import Launch

if TYPE_CHECKING:
    from collections.abc import Mapping

VERSION = "0.2.19"


def environment(folder: Path) -> Environment:
    """LitServe's, made in `folder` if it is not there."""
    return Environment(folder, "litserve", _install)


def _install(made: Environment) -> None:
    made.pip("install", f"litserve=={VERSION}")
    ours = site_packages(Path(sys.executable))
    (site_packages(made.python) / "zz-behind.pth").write_text(f"{ours}\n")


@dataclass(frozen=True)
class LitServePlain:
    """One worker; a batch is what has come when it is free. Its answers come whole."""

    model: str
    python: Path
    dtype: str = "float32"
    max_batch: int = 8
    name: str = "litserve"
    own: Mapping[str, Any] = field(default_factory=dict)
    streams: bool = False

    def launch(self, host: str, port: int) -> Launch:
        script = str(Path(__file__).with_name("litserve_app.py"))
        options = {
            "--host": host,
            "--port": str(port),
            "--max-batch": str(self.max_batch),
            "--dtype": self.dtype,
        }
        named = (word for option in options.items() for word in option)
        return Launch((str(self.python), script, self.model, *named), {"HF_HUB_OFFLINE": "1"}, "/health")
