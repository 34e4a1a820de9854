"""The load generator of `benchmarks.serving`: what it counts, and that it leaves no server behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
import torch
from safetensors.torch import save_file

from benchmarks.serving import __main__ as program
from benchmarks.serving import servers
from benchmarks.serving.asking import Contender, Round, Told, closed_loop, open_loop, questions
from benchmarks.serving.checkpoint import TOWER, renamed
from benchmarks.serving.report import Load, plot, rows, table
from benchmarks.serving.rivals.ours import PrismPrune
from benchmarks.serving.servers import Keeper, Launch, Server, Usage, at_rest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

ANSWERING = Path(__file__).with_name("answering.py")


@dataclass(frozen=True)
class Words:
    """`answering.py` as a rival."""

    model: str = "words"
    streams: bool = True
    name: str = "words"
    own: Mapping[str, object] = field(default_factory=dict)

    def launch(self, _host: str, port: int) -> Launch:
        return Launch((sys.executable, str(ANSWERING), str(port)), {}, "/")


def asked(content: Sequence[object]) -> list[object]:
    """The messages of a request."""
    return [{"role": "user", "content": content}]


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[Keeper]:
    with Keeper(threads=1, logs=tmp_path) as keeper:
        yield keeper


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("way", ["closed", "open"])
def test_every_question_is_asked_once(keeper: Keeper, way: str, streams: bool) -> None:
    """By closed and by open loops; an answer that comes whole has no time per token."""
    contender = Contender(keeper.start(Words(streams=streams)), "words", {})
    contents = questions(5, seed=1)
    loop = (
        closed_loop(contender, contents, clients=2, tokens=3)
        if way == "closed"
        else open_loop(contender, contents, per_s=50, tokens=3, seed=1)
    )
    done = asyncio.run(loop)
    first_words = {answer.text.removesuffix(" word word") for answer in done.answers}
    assert first_words == {sha256(json.dumps(asked(content)).encode()).hexdigest() for content in contents}
    assert len(done.answers) == len(first_words) == 5
    assert {answer.per_token_s is None for answer in done.answers} == {not streams}
    assert all(0 < answer.first_s <= answer.total_s <= done.wall_s for answer in done.answers)
    assert done.usage.peak_bytes > 0


def test_a_round_waits_until_no_server_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some look for work for a while after their last answer; one that does for ever is not waited for."""
    work = (
        "import time; ends = time.process_time() + {}\nwhile time.process_time() < ends: pass\ntime.sleep(60)"
    )
    for seconds, within_s, rests in ((1.2, 30.0, True), (60, 1.0, False)):
        monkeypatch.setattr(servers, "REST_WITHIN_S", within_s)
        with psutil.Popen([sys.executable, "-c", work.format(seconds)]) as process:
            try:
                server = Server(Words(), "", process)
                assert at_rest([server, server]) is rests
                assert (sum(process.cpu_times()[:2]) >= seconds) is rests
            finally:
                process.kill()


def test_a_servers_memory_is_its_most_since_the_round_began() -> None:
    """Also what it gave back before the round's end, and not what it had before the beginning."""
    work = "import sys\nfor line in sys.stdin: held = bytearray(int(line)); del held; print(flush=True)"
    with psutil.Popen([sys.executable, "-c", work], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:

        def hold(size: int) -> None:
            process.stdin.write(f"{size}\n".encode())
            process.stdin.flush()
            process.stdout.readline()

        peaks = []
        try:
            hold(400 * 2**20)
            for size in (1, 200 * 2**20):
                with Server(Words(), "", process).watched() as usage:
                    hold(size)
                peaks.append(usage.peak_bytes)
        finally:
            process.kill()
    without, peak = peaks
    assert 0 < without < 100 * 2**20
    assert 190 * 2**20 < peak < 300 * 2**20


def test_while_one_server_is_asked_the_others_are_stopped(keeper: Keeper) -> None:
    """However the round ends; then they go on."""
    one, other = keeper.start(Words()), keeper.start(Words())
    for error in (None, LookupError):
        with suppress(LookupError), keeper.alone(one):
            one.await_readiness()
            until = time.monotonic() + 30
            while other.process.status() != psutil.STATUS_STOPPED and time.monotonic() < until:
                time.sleep(0.01)
            assert other.process.status() == psutil.STATUS_STOPPED
            if error is not None:
                raise error
        other.await_readiness()


def test_a_server_that_is_gone_is_not_asked(keeper: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "READY_S", 0.1)
    server = keeper.start(Words())
    server.process.kill()
    server.process.wait()
    with pytest.raises(RuntimeError, match="words is no longer ready"):
        server.await_readiness()


def test_an_answer_of_another_length_ends_the_benchmark(keeper: Keeper) -> None:
    """A side that stops early would look fast."""
    contender = Contender(keeper.start(Words(model="2")), "words", {})
    with pytest.raises(RuntimeError, match="2 tokens where 3"):
        asyncio.run(closed_loop(contender, questions(1, seed=1), clients=1, tokens=3))


def test_no_two_questions_of_a_round_show_the_same_picture() -> None:
    """Nor those of two rounds; the same seed asks every side the same."""
    urls = [content[0]["image_url"]["url"] for seed in (0, 100) for content in questions(20, seed)]
    assert len(set(urls)) == len(urls)
    assert questions(3, seed=7) == questions(3, seed=7)


def of_rounds(*walls_s: float) -> list[Round]:
    """Rounds of two answers each, of which one took the whole round and one half of it."""
    return [
        Round(
            (Told(wall / 4, wall, "a", 4, whole=False), Told(wall / 4, wall / 2, "a", 4, whole=False)),
            wall,
            Usage(2**20, wall),
        )
        for wall in walls_s
    ]


def test_ratios_are_those_of_each_round(tmp_path: Path) -> None:
    """Sides are compared round by round, as the machine may be slower in one than in the other."""
    measured = rows(Load("closed", 2), {"vllm": of_rounds(4, 40, 8), "ours": of_rounds(1, 10, 8)})
    baseline, ours = measured
    assert (baseline.rate_ratio, baseline.p50_ratio) == (1, 1)
    assert (ours.rate_ratio, ours.p50_ratio) == (4, 0.25)
    assert (ours.per_s, ours.least_per_s, ours.most_per_s) == (0.25, 0.2, 2)
    assert (ours.p99_s, ours.answers) == (10, 6)
    assert "| 2 clients | ours | 0.25 (0.20 to 2.00) | 4.00 |" in table("head", measured)
    plot(measured, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0


def test_medians_are_of_rounds() -> None:
    """A round with many answers counts no more than another, in any of the columns."""
    (slow,), quick = of_rounds(8), of_rounds(1, 1)
    many = replace(slow, answers=slow.answers * 9)
    (row,) = rows(Load("closed", 2), {"ours": [many, *quick]})
    assert (row.p50_s, row.first_s) == (0.75, 0.25)
    assert row.per_token_s == pytest.approx((0.75 - 0.25) / 3)


def test_of_few_answers_the_greatest_time_is_called_so() -> None:
    """A 99th percentile takes a hundred; a table with both says of which rows it is none."""
    (few,) = rows(Load("closed", 2), {"ours": of_rounds(1)})
    enough = replace(few, answers=100)
    assert "| most |" in table("head", [few])
    assert "| p99 |" in table("head", [enough])
    assert [line.count("(most)") for line in table("head", [few, enough]).splitlines()[-2:]] == [1, 0]


def arguments(monkeypatch: pytest.MonkeyPatch, *words: str) -> list[tuple[str, int]]:
    """Loads and requests of a command line."""
    monkeypatch.setattr(sys, "argv", ["serving", *words])
    return [(str(load), requests) for load, requests in program.loads(program.parsed())]


def test_clients_ask_more_than_once_or_are_no_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that are all sent at once wait for half of each other: another load than a closed loop's."""
    asked_for = [("1 clients", 6), ("8 clients", 16), ("32 clients", 64)]
    assert arguments(monkeypatch) == asked_for
    once = ("--clients", "1,16", "--waves", "1", "--requests", "16", "--rates", "0.5")
    assert arguments(monkeypatch, *once) == [
        ("1 clients", 16),
        ("16 at once", 16),
        ("0.5 requests/s arriving", 16),
    ]


def test_prismprunes_own_logs_outlive_its_data(tmp_path: Path) -> None:
    """Two services with one name have logs of their own."""
    for number in (1, 2):
        data = tmp_path / f"data{number}"
        PrismPrune("model", data, tmp_path / "logs").launch("127.0.0.1", number)
        (data / "logs" / "worker.log").write_text(str(number))
    logs = sorted((tmp_path / "logs").rglob("worker.log"))
    assert [log.read_text() for log in logs] == ["1", "2"]


def test_servers_of_one_name_have_a_log_each(keeper: Keeper) -> None:
    keeper.start(Words())
    keeper.start(Words())
    assert len(list(keeper.logs.glob("words-*.log"))) == 2


def test_no_proxy_is_asked(keeper: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the environment says: servers are on this machine."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(servers, "START_S", 20)
    contender = Contender(keeper.start(Words()), "words", {})
    done = asyncio.run(closed_loop(contender, questions(1, seed=1), clients=1, tokens=2))
    assert len(done.answers) == 1


def test_servers_end_with_the_block(tmp_path: Path) -> None:
    """However it is left."""
    with suppress(LookupError), Keeper(threads=1, logs=tmp_path) as keeper:
        process = keeper.start(Words()).process
        raise LookupError
    assert not process.is_running()


def test_a_server_that_ends_instead_of_starting_is_told_with_its_log(keeper: Keeper) -> None:
    """Nobody waits for it."""

    class Broken(Words):
        def launch(self, _host: str, _port: int) -> Launch:
            return Launch((sys.executable, "-c", "raise SystemExit('no weights')"), {}, "/")

    with pytest.raises(SystemExit, match="no weights"):
        keeper.start(Broken())


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_servers_end_when_the_benchmark_is_killed(tmp_path: Path, end: signal.Signals) -> None:
    """SIGKILL leaves it no time to end them itself, nor to let one go on that is stopped."""
    script = (
        "import pathlib, time; from benchmarks.serving.servers import Keeper, leave_by_sigterm; "
        "from tests.benchmarks.test_serving import Words\n"
        "leave_by_sigterm()\n"
        f"with Keeper(1, pathlib.Path({str(tmp_path)!r})) as keeper:\n"
        "    one, other = keeper.start(Words()), keeper.start(Words())\n"
        "    with keeper.alone(other):\n"
        "        print(one.process.pid, flush=True); time.sleep(60)"
    )
    benchmark = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ANSWERING.parents[2]
    )
    with benchmark:
        assert benchmark.stdout is not None
        server = psutil.Process(int(benchmark.stdout.readline()))
        os.kill(benchmark.pid, end)
    until = time.monotonic() + 30
    with suppress(psutil.NoSuchProcess):
        while server.status() != psutil.STATUS_ZOMBIE and time.monotonic() < until:
            time.sleep(0.05)
        assert server.status() == psutil.STATUS_ZOMBIE


def test_only_the_towers_names_differ(tmp_path: Path) -> None:
    """Published checkpoints name them so, and vLLM reads those names."""
    file = tmp_path / "model.safetensors"
    save_file({f"{TOWER}a.weight": torch.ones(1), "language_model.model.b": torch.zeros(1)}, file)
    assert set(renamed(file)) == {"vision_tower.vision_model.a.weight", "language_model.model.b"}
