"""What a run on CPUs sets up for itself."""

import ctypes
import platform

# Numbers of the settings in glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """Tells glibc to keep the memory that is freed; to be called before large arrays are made.

    A step's buffers are freed at its end. Given back to the system, every page of them faults again in the
    next step; docs/performance.md has the cost. Does nothing where the C library is another one.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    for setting, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_ARENA_MAX, 1)):
        mallopt(setting, value)
