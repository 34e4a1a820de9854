"""transformers' own server, from this environment: what everyone has who has the library."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.serving.servers import Launch

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class TransformersServe:
    """At its defaults. Its continuous batching takes text alone."""

    model: str
    dtype: str = "float32"
    device: str = "cpu"
    name: str = "transformers serve"
    own: Mapping[str, Any] = field(default_factory=dict)
    streams: bool = True

    def launch(self, host: str, port: int) -> Launch:
        program = str(Path(sys.executable).with_name("transformers"))
        options = {"host": host, "port": str(port), "dtype": self.dtype, "device": self.device}
        named = [part for name, value in options.items() for part in (f"--{name}", value)]
        return Launch((program, "serve", self.model, *named), {"HF_HUB_OFFLINE": "1"}, "/health")
