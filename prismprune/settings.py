"""The library's only settings: where things that were fetched or assembled are kept."""

from __future__ import annotations

from pathlib import Path

from platformdirs import user_cache_path
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class LibrarySettings(BaseSettings):
    """Read from the environment with the prefix `PRISM_`."""

    model_config = SettingsConfigDict(env_prefix="PRISM_", env_ignore_empty=True, frozen=True)

    cache_dir: Path = Field(default_factory=lambda: user_cache_path("prismprune"))
    """Fetched parts and the assembled demo checkpoint; safe to delete."""
