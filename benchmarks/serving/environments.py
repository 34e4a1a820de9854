"""Environments of rivals that need other packages than ours: outside the repository, made once."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

DONE = "installed"
"""A file that stands in an environment that is complete."""


@dataclass(frozen=True)
class Environment:
    """A virtual environment `name` below `root`, filled by `install`."""

    root: Path
    name: str
    install: Callable[[Environment], None]

    @property
    def folder(self) -> Path:
        return self.root / self.name

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def ready(self) -> Path:
        """Its python, after an installation (minutes, over the network) if there was none."""
        if not (self.folder / DONE).exists():
            print(f"installing {self.name} into {self.folder}", file=sys.stderr)
            shutil.rmtree(self.folder, ignore_errors=True)
            venv.create(self.folder, with_pip=True, symlinks=True)
            self.install(self)
            (self.folder / DONE).touch()
        return self.python

    def pip(self, *arguments: str) -> None:
        """Run its pip. Raises `subprocess.CalledProcessError`."""
        subprocess.run([self.python, "-m", "pip", "--quiet", *arguments], check=True)  # noqa: S603 -- ours


def site_packages(python: Path) -> Path:
    """Where the packages of that python's environment are."""
    library = python.parent.parent / "lib"
    return library / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
