"""Devices: choosing one, recognising that its memory ran out, and keeping freed memory on a CPU."""

import ctypes
import os

import torch

from textcraftor.errors import ModelError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def choose_device(device: str = "auto", cpu_threads: int | None = None) -> torch.device:
    """`auto`: the GPU where there is one. cpu_threads: how many torch may use on the CPU, None for all.

    Raises ModelError for a device that torch does not know or have.
    """
    if cpu_threads:
        torch.set_num_threads(cpu_threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"Device {device!r} cannot be used: {str(error).splitlines()[0]}. Try cpu, cuda or auto") from None
    if chosen.type == "cpu":
        keep_freed_memory()
    return chosen


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, on a GPU or in the CPU's allocator, or Python itself had no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)


def keep_freed_memory() -> None:
    """Make glibc's allocator keep freed memory, as torch's allocator does on a GPU, instead of returning it at once.

    A training step frees and allocates the same hundreds of megabytes each time. If they are returned to the system in
    between, each page costs a page fault and is zeroed. Peak memory stays the same. Settings in the environment take
    precedence; with other allocators this does nothing.
    """
    if any(name.startswith("MALLOC_") for name in os.environ) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError, OSError):
        return
    for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
        mallopt(option, 1 << 30)
