"""The GPUs of this machine, each used by one stage at a time."""

import contextlib
import itertools
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from queue import SimpleQueue


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """The GPUs that stages may use, as CUDA_VISIBLE_DEVICES names them; none on a machine without.

    Where the variable is not set torch counts them, in a process of its own: it takes seconds to import.
    """
    listed = environment.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        names = [name.strip() for name in listed.split(",")]
        return list(itertools.takewhile(lambda name: name not in ("", "-1"), names))  # CUDA ignores what follows, too
    count = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    found = subprocess.run(count, env=dict(environment), capture_output=True, text=True)
    return [str(index) for index in range(int(found.stdout))] if found.returncode == 0 else []


class GpuPool:
    """Lends each GPU to one stage at a time. Without GPUs any number of stages share the CPU."""

    def __init__(self, gpus: Sequence[str] = ()) -> None:
        self.size = len(gpus)
        self._free: SimpleQueue[str] = SimpleQueue()
        for gpu in gpus:
            self._free.put(gpu)

    def concurrency(self, stages: int) -> int:
        """How many of so many stages run at the same time."""
        return min(stages, self.size) if self.size else stages

    @contextlib.contextmanager
    def lend(self) -> Iterator[str | None]:
        """A GPU for the block, waiting until one is free; None without GPUs."""
        if not self.size:
            yield None
            return
        gpu = self._free.get()
        try:
            yield gpu
        finally:
            self._free.put(gpu)
