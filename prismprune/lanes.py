"""Passes through a model that do not depend on each other, side by side on a CPU.

Every operation of a pass ends with its threads waiting for the slowest of them, and between two operations
all but one wait for Python: a tenth of the time of a tower on two cores. Two passes on a thread each wait for
nobody (`benchmarks/lanes.py`).
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor, wait
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

    Torch gives a thread that uses it for the first time the number of threads that was set last, in any
    thread: one that begins while passes run keeps a lane's unless it sets its own (`torch.set_num_threads`).

    Raises what the first of them raised that did, once none is running. Of the others nothing stays.
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
    waiting: SimpleQueue[tuple[int, Pass[T]]] = SimpleQueue()
    for one in enumerate(passes):
        waiting.put(one)
    done, failed = dict[int, T](), dict[int, BaseException]()
    inference = torch.is_inference_mode_enabled()

    def lane() -> None:
        torch.set_num_threads(threads // lanes)
        with torch.inference_mode() if inference else torch.no_grad():
            while True:
                try:
                    place, run = waiting.get_nowait()
                except Empty:
                    return
                try:
                    done[place] = run()
                except BaseException as error:  # noqa: BLE001 - the caller raises it
                    failed[place] = error

    try:
        wait([_pool(threads).submit(copy_context().run, lane) for _ in range(lanes)])
    finally:
        torch.set_num_threads(threads)  # MKL's number is that of the whole process
    if failed:
        raise _first(failed)
    return [done[place] for place in range(len(passes))]


def _first(failed: dict[int, BaseException]) -> BaseException:
    """Of these errors, which are no longer held.

    Each holds the frames that it came through, and these `failed`: in such a circle a failed pass's tensors
    would stay until Python looks for circles, where memory may be short already.
    """
    first = failed[min(failed)]
    failed.clear()
    return first


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="lane")
