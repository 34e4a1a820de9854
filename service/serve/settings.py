"""What `make serve` can be told. Everything else is a setting of the worker or of the front end."""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import user_data_path
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class ServeSettings(BaseSettings):
    """Read from the environment with the prefix `PRISM_`."""

    model_config = SettingsConfigDict(env_prefix="PRISM_", env_ignore_empty=True, frozen=True, extra="ignore")

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    model: str = "prism-demo"
    data_dir: Path = Field(default_factory=lambda: user_data_path("prismprune") / "serve")
    """Jobs, uploaded media and logs; safe to delete while nothing runs on it."""

    def child_environment(self, **overrides: str) -> dict[str, str]:
        """This process's environment, which carries the user's other settings, with `overrides`."""
        return {**os.environ, "PYTHONUNBUFFERED": "1", **overrides}
