"""What the C library does with the memory that tensors free."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

#: of glibc's `mallopt`: parameters by their names in malloc.h
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
#: nothing goes back to the system, and nothing is asked of it apart from the heap
KEPT = {MMAP_MAX: 0, TRIM_THRESHOLD: 2**31 - 1}
#: what glibc comes to by itself in a program that frees large tensors
USUAL = {MMAP_MAX: 65536, MMAP_THRESHOLD: 32 << 20, TRIM_THRESHOLD: 64 << 20}
#: who sets one of these has said what is to be done with memory
SETTINGS = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")

_lock = Lock()
_inside = 0


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Inside it memory that was freed is kept for what comes next, in the whole process; it is given back at the end.

    glibc gives the memory of large tensors back at once, and the next ones of that size are taken from the system page
    by page, which takes a sixth to a quarter of the time of large batches on a CPU (docs/lab/speed.md). Other C
    libraries, and what the environment says of memory, are left alone.
    """
    mallopt = _mallopt()
    _enter(mallopt)
    try:
        yield
    finally:
        _leave(mallopt)


def _mallopt() -> ctypes.CDLL | None:
    """The C library, where it can be told what to do with memory and the environment has not told it."""
    if not sys.platform.startswith("linux") or any(os.environ.get(name) for name in SETTINGS):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None


def _enter(library: ctypes.CDLL | None) -> None:
    global _inside
    with _lock:
        _inside += 1
        if _inside == 1 and library is not None:
            _set(library, KEPT)


def _leave(library: ctypes.CDLL | None) -> None:
    global _inside
    with _lock:
        _inside -= 1
        if _inside == 0 and library is not None:
            _set(library, USUAL)
            library.malloc_trim(ctypes.c_size_t(0))


def _set(library: ctypes.CDLL, values: dict[int, int]) -> None:
    for parameter, value in values.items():
        library.mallopt(parameter, value)
