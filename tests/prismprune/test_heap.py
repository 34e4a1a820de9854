"""Memory that the process keeps between requests, and in what pages, on glibc."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from prismprune.heap import TUNABLES, keep_freed_memory, with_large_pages

PROBE = """
import resource, sys, threading
import torch
from prismprune.heap import keep_freed_memory

kept = sys.argv[1] == "kept"
assert not kept or keep_freed_memory()

def request():
    # Of activations' sizes: written, and freed.
    for megabytes in (4, 16, 80):
        torch.ones(megabytes << 18)

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def requests():
    for _ in range(10):
        request()
    before = faults()
    for _ in range(10):
        request()
    print(faults() - before)

thread = threading.Thread(target=requests)
thread.start()
thread.join()
"""


def page_faults(way: str) -> int:
    """Of ten requests after the first ten, in a thread of a process of its own."""
    done = subprocess.run([sys.executable, "-c", PROBE, way], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator than glibc's")
def test_requests_write_to_memory_that_earlier_ones_left() -> None:
    """The kernel finds and zeroes next to no page for a later request; for glibc as it is it does."""
    assert page_faults("kept") * 4 < page_faults("as it is")


def test_another_allocator_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """On macOS, or with musl, nothing is set, and the caller hears it."""
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not keep_freed_memory()


LARGE = """
import torch
weights = torch.ones(64 << 18)
print(open("/proc/self/smaps_rollup").read())
"""
GLIBC = tuple(map(int, platform.libc_ver()[1].split("."))) if platform.libc_ver()[0] == "glibc" else ()
SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    not SWITCH.exists() or "[never]" in SWITCH.read_text(), reason="the kernel gives no large pages"
)
@pytest.mark.skipif(GLIBC < (2, 35), reason="the allocator does not ask for any")
def test_a_program_is_given_large_pages() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LARGE],
        env=with_large_pages(os.environ),
        capture_output=True,
        text=True,
        check=True,
    )
    (told,) = [line.split() for line in done.stdout.splitlines() if line.startswith("AnonHugePages")]
    assert int(told[1]) >= 2 << 10  # kB: one at least, as the kernel may be short of them


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, "glibc.malloc.hugetlb=1"),
        ({TUNABLES: ""}, "glibc.malloc.hugetlb=1"),
        ({TUNABLES: "glibc.malloc.check=3"}, "glibc.malloc.check=3:glibc.malloc.hugetlb=1"),
        ({TUNABLES: "glibc.malloc.hugetlb=0"}, "glibc.malloc.hugetlb=0"),
    ],
)
def test_what_somebody_else_set_stays(before: dict[str, str], after: str) -> None:
    assert with_large_pages({"HOME": "/", **before}) == {"HOME": "/", TUNABLES: after}
