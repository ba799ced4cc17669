"""What memory costs in time on the CPU: page faults, and the allocator that may be told to keep what was freed.

glibc hands large blocks back to the system as soon as they are freed, and the system zeroes every page when it is
touched again: a pass that holds its activations for a moment pays for tens of thousands of pages, pass after pass.
Needs no torch.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
from functools import cache
from pathlib import Path

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

__all__ = ["ENVIRONMENT", "allocator", "keep_memory", "page_faults"]

# What glibc reads at the start of a process; `keep_memory` asks for the same in one that runs.
ENVIRONMENT = "MALLOC_MMAP_THRESHOLD_=1000000000 MALLOC_TRIM_THRESHOLD_=10000000000 MALLOC_TOP_PAD_=100000000"

# From malloc.h of glibc.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3

_kept = False


def keep_memory() -> bool:
    """Let this process keep the memory that it frees, so that a pass does not map its activations anew.

    It holds for the whole process and until its end: what is freed serves later allocations, but not other processes,
    so that the process stays as large as it was at its largest. Worth it where passes of one kind follow each other.
    Values do not change. Call it before the first pass.

    Returns:
        Whether it took effect: only with the allocator of glibc, which is the usual one on Linux.

    Example:
        >>> import tokenmix
        >>> tokenmix.keep_memory()  # doctest: +SKIP
        True
    """
    global _kept
    if not _is_glibc():
        return False
    set_option = ctypes.CDLL(None).mallopt
    # Older releases refuse more than 32 MiB.
    mapped = any(set_option(_MMAP_THRESHOLD, size) for size in (1_000_000_000, 32 * 2**20))
    _kept = bool(mapped and set_option(_TRIM_THRESHOLD, -1) and set_option(_TOP_PAD, 100_000_000))
    return _kept


def allocator() -> tuple[str, str]:
    """(The C allocator of this process, what to do about it); the latter is empty where nothing is to be done."""
    if not _is_glibc():
        return _provider() or "the system's", ""
    told = {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"} <= os.environ.keys()
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if _kept or told or all(f"glibc.malloc.{word}_threshold" in tunables for word in ("mmap", "trim")):
        return "glibc, told to keep freed memory", ""
    return "glibc, hands freed memory back", f"tokenmix.keep_memory() or {ENVIRONMENT}"


def page_faults() -> int:
    """How often this process touched a page that the system had to supply, since it started; 0 if unknown."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt if resource is not None else 0


def _is_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc" and (_provider() or "libc").startswith("libc")


@cache
def _provider() -> str:
    """The library whose `malloc` is called, such as libc or libjemalloc; empty where that cannot be told."""
    try:
        maps = Path("/proc/self/maps").read_text().splitlines()
        address = ctypes.cast(ctypes.CDLL(None).malloc, ctypes.c_void_p).value or 0
    except (OSError, AttributeError, TypeError):
        return ""
    for line in maps:
        span, *_, file = line.split(maxsplit=5)
        low, high = (int(end, 16) for end in span.split("-"))
        if low <= address < high:
            return re.split(r"[-.]", Path(file).name)[0]
    return ""
