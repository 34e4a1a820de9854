"""Memory that the process keeps between requests, on glibc."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from prismprune.heap import keep_freed_memory

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
