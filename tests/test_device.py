"""What is freed is kept, on a CPU."""

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from textcraftor.device import keep_freed_memory
keep_freed_memory()
def step():
    return [torch.ones(2_000_000) for _ in range(20)]  # 160 MB
for _ in range(5):  # until the heap has found its shape
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator than glibc's")
def test_memory_that_a_step_freed_is_kept_for_the_next() -> None:
    """Handed back to the system, it costs 39,000 faults a step, unless the allocator has learnt better by itself."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run([sys.executable, "-c", FAULTS], env=plain, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2000
