"""Memory that is freed and asked for again in every step."""

import contextlib
import ctypes

# Parameters of glibc's mallopt(3).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> None:
    """Let the process keep the memory that it frees, instead of handing it to the kernel and asking for it again.

    On CPU glibc's malloc returns every large tensor, and half of a training step goes into mapping and clearing the
    pages anew. With another C library nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_TOP_PAD, 2**28)
