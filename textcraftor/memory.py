"""Memory: running out of it, recognised on every device; and keeping it on a CPU."""

import ctypes
import os

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, on a GPU or in the CPU's allocator, or Python itself had no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)


def keep_freed_memory() -> None:
    """Let the allocator of a Linux process keep what it frees, as torch's does on a GPU, instead of returning it at once.

    A training step frees and asks for the same hundreds of megabytes each time. Handed back to the system in between,
    every page of them costs a fault and a zeroing. What the process holds at most is the same. Settings in the
    environment win; elsewhere than in glibc nothing happens.
    """
    if any(name.startswith("MALLOC_") for name in os.environ) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError, OSError):
        return
    for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
        mallopt(option, 1 << 30)
