"""PrismPrune as `make serve` starts it, without its caches, in the others' number format, on their device."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from benchmarks.serving.servers import Launch, log_name

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@dataclass(frozen=True)
class PrismPrune:
    """Keeps its data, its broker's too, in a folder of its own. The budget is a field of each request.

    logs: below it are those of its parts, in a folder for each launch.
    """

    model: str
    data: Path
    logs: Path
    dtype: str = "float32"
    device: str = "cpu"
    max_batch: int = 8
    settings: Mapping[str, str] = field(default_factory=dict)
    name: str = "prismprune"
    own: Mapping[str, Any] = field(default_factory=dict)
    streams: bool = True

    def launch(self, host: str, port: int) -> Launch:
        self._lead_out_logs(log_name(self.name, port))
        environment = {
            "PRISM_HOST": host,
            "PRISM_PORT": str(port),
            "PRISM_DATA_DIR": str(self.data),
            "PRISM_MODEL": self.model,
            "PRISM_DTYPE": self.dtype,
            "PRISM_DEVICE": self.device,
            "PRISM_MAX_BATCH": str(self.max_batch),
            "PRISM_MEDIA_CACHE_BYTES": "0",
            "PRISM_PREFIX_CACHE_BYTES": "0",
            "PRISM_TIMEOUT_S": "600",  # as long as the client waits
            "PRISM_ENGINE_STALL_S": "3600",  # it is stopped while others are asked, and is not to be missed
            **self.settings,
        }
        return Launch((sys.executable, "-m", "service.serve"), environment, "/healthz")

    def _lead_out_logs(self, folder: str) -> None:
        """Its data end with the benchmark; why a part of it failed is read afterwards."""
        own, place = (self.logs / folder).absolute(), self.data / "logs"
        own.mkdir(parents=True, exist_ok=True)
        self.data.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)  # of a launch before
        place.symlink_to(own)
