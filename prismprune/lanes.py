"""Passes through a model that do not depend on each other, side by side on a CPU.

Every operation of a pass ends with its threads waiting for the slowest of them, and between two operations
all but one wait for Python: a tenth of the time of a tower on two cores. Two passes on a thread each wait for
nobody (`benchmarks/lanes.py`).
"""

from __future__ import annotations

import math
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextvars import copy_context
from functools import cache
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, TypeVar

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Pass = Callable[[], "T"]

T = TypeVar("T")


def side_by_side(passes: Sequence[Pass[T]], device: torch.device, at_once: float = math.inf) -> list[T]:
    """What each of them returns, in their order; they should take about equally long.

    On a CPU as many run at a time, and at most `at_once`, as divide torch's threads (`torch.get_num_threads`)
    evenly, and what is left over has more threads each: of three passes on two threads two run side by side,
    the last on both. Each sees the context variables of the caller. Elsewhere, and where torch keeps for the
    calling thread alone what the passes have to know (gradients, autocast, dispatch modes such as
    `FlopCounterMode`), they run one after the other.

    Raises what the first of them raised that did, once none is running.
    """
    threads, done = torch.get_num_threads(), list[T]()
    alone = device.type != "cpu" or _bound_to_thread()
    while left := passes[len(done) :]:
        lanes = 1 if alone else lanes_of(int(min(len(left), at_once)), threads)
        if lanes == 1:
            done.append(left[0]())
        else:
            done += _in_lanes(left[: len(left) // lanes * lanes], lanes, threads)
    return done


def lanes_of(passes: int, threads: int) -> int:
    """The most lanes that there are passes for, with the same number of threads each."""
    return max(lanes for lanes in range(1, min(passes, threads) + 1) if threads % lanes == 0)


def _bound_to_thread() -> bool:
    return torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or is_in_torch_dispatch_mode()


def _in_lanes(passes: Sequence[Pass[T]], lanes: int, threads: int) -> list[T]:
    waiting: SimpleQueue[tuple[Future[T], Pass[T]]] = SimpleQueue()
    ends = [Future[T]() for _ in passes]
    for one in zip(ends, passes, strict=True):
        waiting.put(one)
    inference = torch.is_inference_mode_enabled()

    def lane() -> None:
        torch.set_num_threads(threads // lanes)
        with torch.inference_mode() if inference else torch.no_grad():
            while True:
                try:
                    end, run = waiting.get_nowait()
                except Empty:
                    return
                try:
                    end.set_result(run())
                except BaseException as error:  # noqa: BLE001 - the caller raises it
                    end.set_exception(error)

    try:
        wait([_pool(threads).submit(copy_context().run, lane) for _ in range(lanes)])
    finally:
        torch.set_num_threads(threads)  # MKL's number is that of the whole process
    return [end.result() for end in ends]


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="lane")
