"""The supervisor of `make serve`, with small stand-ins for the broker, the worker and the front end."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.keys import ApiKeys, new_key
from service.serve import stack
from service.serve.errors import ChildFailedError, DataDirectoryError, PortInUseError
from service.serve.machine import claim, free_ports, require_free_port
from service.serve.settings import ServeSettings
from service.serve.tree import Command, ProcessTree
from tests.present import present
from tests.service.conftest import until

FOREVER = "import time; time.sleep(600)"
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    "print('up', flush=True); time.sleep(600)"
)
PARENT = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {FOREVER!r}]); {FOREVER}"


def python(name: str, code: str, **options: Any) -> Command:
    return Command(name, (sys.executable, "-c", code), **options)


def descendants() -> list[psutil.Process]:
    return [each for each in psutil.Process().children(recursive=True) if each.is_running()]


def gone(processes: list[psutil.Process]) -> bool:
    return all(not each.is_running() or each.status() == psutil.STATUS_ZOMBIE for each in processes)


async def test_the_death_of_one_child_ends_the_others_and_names_it(tmp_path: Path) -> None:
    """A child that ends by itself ends the tree, with its name, exit code and last lines as the reason."""
    before = set(descendants())
    dying = python(
        "worker", "print('no such model', flush=True); raise SystemExit(3)", log=tmp_path / "worker.log"
    )

    async def start_up(tree: ProcessTree) -> None:
        await tree.start(python("broker", FOREVER))
        await tree.start(dying)

    with pytest.raises(ChildFailedError, match=r"(?s)worker ended with code 3.*no such model"):
        async with ProcessTree() as tree:
            await tree.supervise(start_up(tree))
    assert set(descendants()) <= before


async def test_a_child_killed_by_a_signal_is_reported_as_such() -> None:
    """The message tells a killed child (out of memory, say) from one that gave up."""

    async def start_up(tree: ProcessTree) -> None:
        await tree.start(python("worker", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"))

    with pytest.raises(ChildFailedError, match="worker was killed by signal 9"):
        async with ProcessTree() as tree:
            await tree.supervise(start_up(tree))


async def test_children_end_in_the_opposite_order_of_their_start(tmp_path: Path) -> None:
    """The front end goes before the worker and the worker before the broker."""
    code = """
import pathlib, signal, sys, time
def end(*_):
    with pathlib.Path(sys.argv[1]).open("a") as file: print(sys.argv[2], file=file)
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
pathlib.Path(sys.argv[1] + sys.argv[2]).touch()
time.sleep(600)
"""
    order = tmp_path / "order"

    async def start_up(tree: ProcessTree) -> None:
        for name in ("broker", "worker", "front end"):
            await tree.start(Command(name, (sys.executable, "-c", code, str(order), name)))
        await until(lambda: len(list(tmp_path.iterdir())) == 3)
        tree.interrupt()

    async with ProcessTree() as tree:
        await tree.supervise(start_up(tree))
    assert order.read_text().splitlines() == ["front end", "worker", "broker"]


async def test_what_a_child_started_goes_with_it() -> None:
    """A video decoder that the worker started does not outlive the tree."""
    before = set(descendants())

    async def start_up(tree: ProcessTree) -> None:
        await tree.start(python("worker", PARENT))
        await until(lambda: len(set(descendants()) - before) == 3)  # the guard, the child, its child
        tree.interrupt()

    seen: list[psutil.Process] = []
    async with ProcessTree() as tree:
        await tree.supervise(start_up(tree))
        seen = [each for each in descendants() if each not in before]
    assert len(seen) == 3
    await until(lambda: gone(seen))


async def test_a_second_interrupt_does_not_wait_for_a_stubborn_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C twice ends a child that ignores SIGTERM, long before its patience is over."""
    monkeypatch.setattr("service.serve.tree.ECHO_S", -1)
    log, before = tmp_path / "log", set(descendants())

    async def start_up(tree: ProcessTree) -> None:
        await tree.start(python("worker", STUBBORN, log=log, patience_s=3600))
        await until(lambda: log.read_text() == "up\n")
        tree.interrupt()
        tree.interrupt()

    async with ProcessTree() as tree:
        await tree.supervise(start_up(tree))
    assert set(descendants()) <= before


async def test_an_echo_of_the_first_interrupt_is_not_a_second_one() -> None:
    """`make` passes SIGTERM on to a supervisor that got it already: children keep their patience."""
    tree = ProcessTree()
    tree.interrupt()
    tree.interrupt()
    assert not tree._hurry.is_set()


async def test_a_stubborn_child_is_killed_when_its_patience_is_over(tmp_path: Path) -> None:
    """A worker that does not finish its job in time does not keep the terminal."""
    log, before = tmp_path / "log", set(descendants())

    async def start_up(tree: ProcessTree) -> None:
        await tree.start(python("worker", STUBBORN, log=log, patience_s=0.05))
        await until(lambda: log.read_text() == "up\n")
        tree.interrupt()

    async with ProcessTree() as tree:
        await tree.supervise(start_up(tree))
    assert set(descendants()) <= before


async def test_a_step_that_fails_ends_the_tree() -> None:
    """The demo model's fetch failing is a reason to stop, not to go on without a model."""

    async def start_up(tree: ProcessTree) -> None:
        await tree.run(python("fetch", "pass"))
        await tree.run(python("fetch", "raise SystemExit(1)"))

    with pytest.raises(ChildFailedError, match="fetch ended with code 1"):
        async with ProcessTree() as tree:
            await tree.supervise(start_up(tree))


async def test_an_interrupt_during_start_up_ends_the_step_that_runs() -> None:
    """Ctrl-C during the download stops the download."""
    before = set(descendants())

    async def start_up(tree: ProcessTree) -> None:
        asyncio.get_running_loop().call_later(0.1, tree.interrupt)
        await tree.run(python("fetch", FOREVER))
        pytest.fail("the step did not end")

    async with ProcessTree() as tree:
        await tree.supervise(start_up(tree))
    assert set(descendants()) <= before


async def test_the_guards_death_ends_the_tree() -> None:
    """Without the guard nobody would clean up after a killed supervisor, so the tree does not go on."""

    async def start_up(tree: ProcessTree) -> None:
        await tree.start(python("broker", FOREVER))
        tree._guard.kill()

    with pytest.raises(ChildFailedError, match="guard was killed by signal 9"):
        async with ProcessTree() as tree:
            await tree.supervise(start_up(tree))


SUPERVISOR = f"""
import asyncio, sys
from service.serve.tree import Command, ProcessTree

async def main():
    async with ProcessTree() as tree:
        await tree.start(Command("worker", (sys.executable, "-c", {PARENT!r})))
        await tree.start(Command("stubborn", (sys.executable, "-c", {STUBBORN!r})))
        await asyncio.sleep(600)

asyncio.run(main())
"""


async def test_nothing_outlives_a_supervisor_that_was_killed() -> None:
    """SIGKILL for the supervisor leaves no child and no grandchild, not even one that ignores SIGTERM."""
    supervisor = subprocess.Popen(  # noqa: ASYNC220 (the loop has nothing else to do)
        [sys.executable, "-c", SUPERVISOR], stdout=subprocess.PIPE
    )
    tree = psutil.Process(supervisor.pid)
    await until(lambda: len(tree.children(recursive=True)) == 4)
    assert supervisor.stdout
    assert supervisor.stdout.readline() == b"up\n"
    family = tree.children(recursive=True)
    supervisor.kill()
    supervisor.wait()
    await until(lambda: gone(family))


def serve(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "service.serve"],
        env={**os.environ, "PRISM_DATA_DIR": str(tmp_path), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_a_port_in_use_is_said_before_anything_starts(tmp_path: Path) -> None:
    """The newcomer reads which port, why, and what to type instead."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = serve(tmp_path, PRISM_PORT=str(port))
    assert ended.returncode == 1
    assert f"Port {port} on 127.0.0.1 cannot be used" in ended.stdout
    assert f"PRISM_PORT={port + 1} make serve" in ended.stdout
    assert "[1/4]" not in ended.stdout


def test_a_second_start_on_the_same_data_is_refused(tmp_path: Path) -> None:
    """Two brokers on one append-only file would ruin it."""
    with claim(tmp_path):
        ended = serve(tmp_path, PRISM_PORT=str(free_ports(1)[0]))
    assert ended.returncode == 1
    assert f"Process {os.getpid()} already serves from {tmp_path}" in ended.stdout
    assert "Traceback" not in ended.stderr


def test_a_bad_setting_is_named(tmp_path: Path) -> None:
    """A wrong environment variable is named; there is no traceback."""
    ended = serve(tmp_path, PRISM_PORT="eighty")
    assert ended.returncode == 2
    assert "PRISM_PORT: Input should be a valid integer" in ended.stdout
    assert "Traceback" not in ended.stderr


def test_a_data_directory_that_cannot_be_made_is_a_clear_message(tmp_path: Path) -> None:
    """A path below a plain file is not a directory."""
    (tmp_path / "file").touch()
    with pytest.raises(DataDirectoryError, match="cannot be written"), claim(tmp_path / "file" / "data"):
        pass


def test_the_directory_is_free_again_after_a_claim(tmp_path: Path) -> None:
    """The lock belongs to the running process, not to the file that it leaves behind."""
    with claim(tmp_path):
        pass
    with claim(tmp_path):
        assert (tmp_path / "lock").read_text() == str(os.getpid())


def test_an_address_that_is_not_this_machines_is_refused() -> None:
    """The system's own reason is part of the message."""
    with pytest.raises(PortInUseError, match=r"192\.0\.2\.1"):
        require_free_port("192.0.2.1", 8000)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "::"])
def test_a_port_is_free_until_somebody_listens_on_it(host: str) -> None:
    """In either family of addresses."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, 0), family=family)
    except OSError:
        pytest.skip("this machine has no IPv6")
    with listening:
        port = listening.getsockname()[1]
        with pytest.raises(PortInUseError, match="in use"):
            require_free_port(host, port)
    require_free_port(host, port)


def test_the_password_is_on_no_command_line_and_in_the_childrens_environment(tmp_path: Path) -> None:
    """`ps` shows command lines to every user of the machine; an environment only to its owner."""
    planned = stack.Stack.plan(ServeSettings(data_dir=tmp_path))
    for command in (planned.broker(), planned.worker(), planned.front_end()):
        assert not any(planned.password in each for each in command.argv)
    assert planned.password in present(planned.worker().environment)["PRISM_BROKER_URL"]
    assert present(planned.front_end().environment)["PRISM_METRICS_UPSTREAMS"].endswith(
        f":{present(planned.worker().environment)['PRISM_WORKER_METRICS_PORT']}/metrics"
    )


def test_where_keys_are_asked_for_the_program_has_one_of_its_own(tmp_path: Path) -> None:
    """It waits for `/healthz`; its key is drawn anew at each start, beside the operator's."""
    _, line = new_key("alice")
    planned = stack.Stack.plan(ServeSettings(data_dir=tmp_path, api_keys=line))
    lines = present(planned.front_end().environment)["PRISM_API_KEYS"].split(",")
    assert lines[0] == line
    assert ApiKeys(lines).caller(f"Bearer {planned.key}").owner == "make-serve"
    assert not any(planned.key in each for each in present(planned.front_end().environment).values())
    keyless = stack.Stack.plan(ServeSettings(data_dir=tmp_path))
    assert "PRISM_API_KEYS" not in present(keyless.front_end().environment)


def test_beyond_loopback_it_starts_nothing_without_keys(tmp_path: Path) -> None:
    """The terminal says what to do instead; nothing was fetched or started."""
    ended = serve(tmp_path, PRISM_HOST="0.0.0.0", PRISM_PORT=str(free_ports(1)[0]))
    assert ended.returncode == 1
    assert "python -m service.keys NAME" in ended.stdout
    assert "[1/4]" not in ended.stdout


@pytest.mark.parametrize(
    ("host", "address"),
    [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("::", "::1"), ("10.0.0.5",) * 2],
)
def test_the_front_end_is_waited_for_where_it_listens(host: str, address: str) -> None:
    """On its own address, or on loopback where it listens on all of them."""
    assert ServeSettings(host=host).reached_at == address


def test_the_users_other_settings_reach_the_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`PRISM_MAX_BATCH=2 make serve` is the worker's business and arrives there."""
    monkeypatch.setenv("PRISM_MAX_BATCH", "2")
    planned = stack.Stack.plan(ServeSettings(data_dir=tmp_path))
    assert present(planned.worker().environment)["PRISM_MAX_BATCH"] == "2"


@given(name=st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=20))
def test_a_path_with_quotes_and_spaces_stays_one_value_of_the_brokers_file(name: str) -> None:
    """Quotes and backslashes are escaped, so that the data directory may be called anything."""
    quoted = stack._quoted(Path("/data") / name)
    assert quoted[0] == quoted[-1] == '"'
    assert quoted[1:-1].replace('\\"', "\0").replace("\\\\", "\1").count('"') == 0


async def test_the_real_broker_writes_to_disk_evicts_nothing_and_wants_its_password(tmp_path: Path) -> None:
    """What the front end checks at its own start is true of the embedded broker."""
    from redis.asyncio import Redis
    from redis.exceptions import AuthenticationError

    planned = stack.Stack.plan(ServeSettings(data_dir=tmp_path))

    async def start_up(tree: ProcessTree) -> None:
        await tree.start(planned.broker())
        await stack._broker_ready(planned.broker_url)
        async with Redis.from_url(planned.broker_url) as broker:
            config = await broker.config_get("appendonly", "appendfsync", "maxmemory-policy")
        assert config["appendonly"] == "yes"
        assert config["appendfsync"] == "no"  # `everysec` may hold writes back
        assert config["maxmemory-policy"] == "noeviction"
        async with Redis(port=planned.broker_port) as stranger:
            with pytest.raises(AuthenticationError):
                await stranger.ping()
        tree.interrupt()

    async with ProcessTree() as tree:
        await tree.supervise(start_up(tree))
    assert list((tmp_path / "broker").rglob("*.aof"))
