"""What glibc's allocator can be told for a process that answers one request after another.

It keeps memory for the next request instead of giving it back to the system, and takes it in larger pages.
"""

from __future__ import annotations

import ctypes
import platform
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

KEPT_BYTES = 1 << 30
"""Free memory beyond this goes back to the system."""
LARGEST_BYTES = 256 << 20
"""A block of this size or more is the system's: taken for itself, and given back when it is freed."""

TUNABLES = "GLIBC_TUNABLES"
"""The environment variable that glibc reads as a program starts; colons lie between its settings."""
_LARGE_PAGES = "glibc.malloc.hugetlb"

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


def with_large_pages(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` for a program to be started whose allocator asks the kernel for pages of 2 MiB.

    A model's weights are read from end to end for every token, and with pages of 4 KiB the processor looks up
    half a million addresses on the way. The kernel gives such pages where its `transparent_hugepage/enabled`
    is `madvise` or `always`, and where it has them. glibc knows the setting from 2.35 on; what else reads the
    variable leaves it alone. A value for it that is there already stays.
    """
    told = environment.get(TUNABLES, "")
    if _LARGE_PAGES in told:
        return dict(environment)
    return {**environment, TUNABLES: ":".join(filter(None, (told, f"{_LARGE_PAGES}=1")))}
