"""What `make serve` can be told. Everything else is a setting of the worker or of the front end."""

from __future__ import annotations

import os
from pathlib import Path  # noqa: TC003 (pydantic reads the annotations at run time)

from platformdirs import user_data_path
from pydantic import Field

from service.settings import ListenSettings


class ServeSettings(ListenSettings):
    """Read from the environment with the prefix `PRISM_`."""

    model: str = "prism-demo"
    data_dir: Path = Field(default_factory=lambda: user_data_path("prismprune") / "serve")
    """Jobs, uploaded media and logs; safe to delete while nothing runs on it."""

    @property
    def reached_at(self) -> str:
        """Where this machine finds the front end: a wildcard is no address to go to."""
        return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)  # noqa: S104 (nothing is bound)

    def child_environment(self, **overrides: str) -> dict[str, str]:
        """This process's environment, which carries the user's other settings, with `overrides`."""
        return {**os.environ, "PYTHONUNBUFFERED": "1", **overrides}
