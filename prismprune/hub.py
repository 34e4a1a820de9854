"""Checkpoints of the hub: whether it can be asked, and which of them its cache holds."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CacheNotFound, get_hf_file_metadata, hf_hub_url, resolve_revision, scan_cache_dir
from huggingface_hub.errors import (  # type: ignore[attr-defined] # `HTTPError` is its client's
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RevisionResolutionError,
)

from prismprune.families import FAMILIES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from huggingface_hub import CachedRepoInfo, CachedRevisionInfo

CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True, slots=True)
class CachedCheckpoint:
    """A checkpoint in the hub's cache, of a family with an adapter.

    revision: its commit. size_bytes: on disk, of that commit. complete: whether all weights are there.
    """

    name: str
    family: str
    revision: str
    size_bytes: int
    complete: bool


def origin_of(path: str, revision: str | None = None) -> dict[str, Any]:
    """`revision` and `local_files_only` for transformers' `from_pretrained` of a directory or a hub id.

    The revision is a commit, a `ResolvedRevision`, where the hub or its cache knows it. A hub that is away is
    asked once: transformers would ask again, 23 s long, for each file that the cache does not hold.

    Raises `ValueError` for what is neither a directory nor can be a hub id.
    """
    if Path(path).is_dir():
        return {"revision": revision, "local_files_only": True}
    local = not _answers(path, revision)
    with suppress(HTTPError, RevisionResolutionError):  # what is wrong with it, transformers says better
        revision = resolve_revision(path, revision=revision, local_files_only=local)
    return {"revision": revision, "local_files_only": local}


def _answers(path: str, revision: str | None) -> bool:
    """Whether the hub says anything at all, within its library's `HF_HUB_ETAG_TIMEOUT`."""
    try:
        get_hf_file_metadata(hf_hub_url(path, CONFIG, revision=revision))
    except HfHubHTTPError:
        return True
    except (HTTPError, OfflineModeIsEnabled):
        return False
    return True


def cached_checkpoints() -> list[CachedCheckpoint]:
    """What of the hub is on this machine and can be served, by name; of each its `main`, else the latest."""
    try:
        repositories = scan_cache_dir().repos
    except CacheNotFound:
        return []
    found = (_cached(repository) for repository in repositories if repository.repo_type == "model")
    return sorted(filter(None, found), key=lambda checkpoint: checkpoint.name)


def _cached(repository: CachedRepoInfo) -> CachedCheckpoint | None:
    revision = repository.refs.get("main") or max(
        repository.revisions, key=lambda one: one.last_modified, default=None
    )
    files = _files(revision) if revision else {}
    if revision is None or CONFIG not in files:
        return None
    try:
        family = json.loads(files[CONFIG].read_text(encoding="utf-8"))["model_type"]
    except (ValueError, KeyError):
        return None  # a download that broke off, or a config of another library
    if family not in FAMILIES:
        return None
    return CachedCheckpoint(
        repository.repo_id, family, revision.commit_hash, revision.size_on_disk, _complete(files)
    )


def _files(revision: CachedRevisionInfo) -> dict[str, Path]:
    """By name inside the repository."""
    return {
        str(file.file_path.relative_to(revision.snapshot_path)): file.file_path for file in revision.files
    }


def _complete(files: Mapping[str, Path]) -> bool:
    """Whether all weights are there: in one file, or in all of those that an index names."""
    for weights in WEIGHTS:
        index = files.get(f"{weights}.index.json")
        if weights in files:
            return True
        if index is not None:
            return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) <= files.keys()
    return False
