"""Running out of memory, recognised on every device."""

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, on a GPU or in the CPU's allocator, or Python itself had no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)
