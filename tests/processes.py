"""Run a function of a test in several processes, as `torchrun` would."""

import os
import signal
import socket
import traceback
from collections.abc import Callable

import torch

from textcraftor.distributed import data_parallel


def in_processes(count: int, work: Callable[[], None]) -> None:
    """Run `work` in `count` forked processes that join one process group. Raises if one of them fails or hangs.

    `work` must not use polars: its thread pool does not survive a fork.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            status = 1
            signal.alarm(240)
            try:
                os.environ.update(WORLD_SIZE=str(count), RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
                os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # else it looks this machine's name up, which may take long
                data_parallel.start(torch.device("cpu"))
                work()
                data_parallel.finish()
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * count
