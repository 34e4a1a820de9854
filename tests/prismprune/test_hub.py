"""Checkpoints of the hub: what its cache holds, and what happens where it cannot be asked."""

from __future__ import annotations

import json
import shutil
import socket
from typing import TYPE_CHECKING, Any

import huggingface_hub.utils
import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from prismprune import PrunedVLM, UnknownModelError
from prismprune.cli import app
from prismprune.hub import cached_checkpoints, origin_of
from prismprune.planning import plan
from tests.prismprune.tiny import picture

if TYPE_CHECKING:
    from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LLAVA = {"config.json": json.dumps({"model_type": "llava"})}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub's cache of our own, empty."""
    folder = tmp_path / "hub"
    folder.mkdir()
    for module in ("constants", "utils._cache_manager"):
        monkeypatch.setattr(f"huggingface_hub.{module}.HF_HUB_CACHE", str(folder), raising=False)
    return folder


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A hub behind a closed port; what is waited, in seconds, before it is asked again."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = f"http://127.0.0.1:{server.getsockname()[1]}"
    hub, waited = constants.ENDPOINT, list[float]()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE"):
        monkeypatch.setattr(constants, name, getattr(constants, name).replace(hub, closed))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", waited.append)
    return waited


def keep(cache: Path, name: str, files: dict[str, str], commit: str = COMMIT, ref: str = "main") -> Path:
    """Lay a repository into the cache as the hub's library does; returns the folder of its files."""
    repository = cache / f"models--{name.replace('/', '--')}"
    folder = repository / "snapshots" / commit
    folder.mkdir(parents=True)
    for path, text in files.items():
        (folder / path).write_text(text)
    if ref:
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / ref).write_text(commit)
    return folder


def test_only_checkpoints_of_known_families_are_listed(cache: Path) -> None:
    """By name; neither language models, nor data sets, nor what has no config."""
    keep(cache, "us/second", LLAVA | {"model.safetensors": "weights"})
    keep(cache, "us/first", {"config.json": json.dumps({"model_type": "video_llava"})})
    keep(cache, "us/llama", {"config.json": json.dumps({"model_type": "llama"})})
    keep(cache, "us/tokenizer", {"tokenizer.json": "{}"})
    keep(cache, "us/data", LLAVA).parents[1].rename(cache / "datasets--us--data")
    first, second = cached_checkpoints()
    assert (first.name, first.family, first.complete) == ("us/first", "video_llava", False)
    assert (second.name, second.family, second.complete) == ("us/second", "llava", True)
    assert second.revision == COMMIT
    assert second.size_bytes == len(LLAVA["config.json"]) + len("weights")


def test_the_main_revision_is_the_one_that_is_meant(cache: Path) -> None:
    """Or the latest, where main is not there."""
    keep(cache, "us/model", LLAVA, "a" * 40)
    keep(cache, "us/model", LLAVA, "b" * 40, ref="")
    keep(cache, "us/other", LLAVA, "c" * 40, ref="v1")
    assert [one.revision[0] for one in cached_checkpoints()] == ["a", "c"]


@pytest.mark.parametrize(
    ("files", "complete"),
    [
        (["model.safetensors"], True),
        (["pytorch_model.bin"], True),
        (["model.safetensors.index.json", "1.safetensors", "2.safetensors"], True),
        (["model.safetensors.index.json", "1.safetensors"], False),
        ([], False),
    ],
)
def test_a_checkpoint_is_complete_with_all_its_weights(
    cache: Path, files: list[str], *, complete: bool
) -> None:
    """In one file, or in all that an index names."""
    index = json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors", "c": "1.safetensors"}})
    keep(cache, "us/model", LLAVA | dict.fromkeys(files, index))
    assert [one.complete for one in cached_checkpoints()] == [complete]


def test_without_a_cache_there_is_nothing(cache: Path) -> None:
    """Where nobody fetched anything yet."""
    cache.rmdir()
    assert cached_checkpoints() == []


def test_a_config_that_is_none_is_passed_over(cache: Path) -> None:
    """A download that broke off does not hide the others."""
    keep(cache, "us/broken", {"config.json": "{"})
    keep(cache, "us/model", LLAVA)
    assert [one.name for one in cached_checkpoints()] == ["us/model"]


def test_the_command_lists_them_beside_the_demo(cache: Path) -> None:
    """For people and for programs."""
    keep(cache, "us/model", LLAVA | {"model.safetensors": "weights"})
    (listed,) = json.loads(CliRunner().invoke(app, ["models", "--json"]).stdout)["cached"]
    assert (listed["name"], listed["family"], listed["complete"]) == ("us/model", "llava", True)
    assert "us/model (llava)" in CliRunner().invoke(app, ["models"]).stdout


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("ask", [plan, PrunedVLM.from_pretrained])
def test_a_hub_that_is_away_is_not_asked_again(ask: Any, away: list[float]) -> None:
    """What its cache does not hold is unknown at once."""
    with pytest.raises(UnknownModelError, match="reached from here"):
        ask("nobody/nothing")
    assert away == []


def test_what_is_cached_is_served_while_the_hub_is_away(
    cache: Path, tiny_llava: Path, away: list[float]
) -> None:
    """By its id and without a retry, though files that a checkpoint may do without are missing."""
    folder = keep(cache, "us/model", {})
    shutil.copytree(tiny_llava, folder, dirs_exist_ok=True)
    vlm = PrunedVLM.from_pretrained("us/model", device="cpu")
    assert vlm.answer(picture(), "What?", 4, max_new_tokens=2).visual_tokens.kept == 4
    assert vlm.revision == COMMIT
    assert away == []


def test_a_directory_is_never_looked_for_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether or not there is a hub."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("The hub is asked.")

    monkeypatch.setattr(huggingface_hub.utils._http, "http_backoff", refuse)
    assert origin_of(str(tmp_path), "v1") == {"revision": "v1", "local_files_only": True}
