"""Memory that a process keeps for its next request instead of giving it back to the system."""

from __future__ import annotations

import ctypes
import platform

KEPT_BYTES = 1 << 30
"""Free memory beyond this goes back to the system."""
LARGEST_BYTES = 256 << 20
"""A block of this size or more is the system's: taken for itself, and given back when it is freed."""

# Parameters of mallopt(3), from glibc's malloc.h.
_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3
_ARENA_MAX = -8


def keep_freed_memory() -> bool:
    """Have glibc's allocator keep what is freed, up to a GiB, and all threads share it.

    By itself it maps blocks of some MiB anew each time, and the kernel zeroes them page by page when they are
    first written: on a CPU a tower's activations are such blocks, and each picture takes thousands of page
    faults. It is a setting of the whole process, so the library never makes it by itself; call this early,
    before there are threads: those that allocated before keep memory of their own. The process then stays
    about as large as its largest request has made it.

    Returns False with another allocator than glibc's, or where it refuses.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    wanted = {_MMAP_THRESHOLD: LARGEST_BYTES, _TRIM_THRESHOLD: KEPT_BYTES, _ARENA_MAX: 1}
    return all(mallopt(parameter, value) == 1 for parameter, value in wanted.items())
