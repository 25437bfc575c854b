"""What a step costs: seconds, peak memory, UNet forwards."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def seconds(step: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """(wall seconds, processor seconds of this process) of one call, the device's work included in the first."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started, worked = time.perf_counter(), time.process_time()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started, time.process_time() - worked


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """The most memory that tensors made by one call held at a time, above what was held before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return int(torch.cuda.max_memory_allocated(device)) - before
    # The CPU's allocator keeps no peak; the profiler sees each allocation. Resident memory would count caches too.
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    results: Any = profile.profiler
    events = [(event.start_ns(), event.nbytes()) for event in results.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for _, change in sorted(events, key=lambda event: event[0]):
        held += change
        peak = max(peak, held)
    return peak


def resident_bytes(modules: Iterable[nn.Module]) -> int:
    """Parameters and buffers of the modules; what they share counts once."""
    tensors = {t.data_ptr(): t for module in modules for t in (*module.parameters(), *module.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def unwanted_bytes(modules: Iterable[nn.Module]) -> int:
    """Gradients that lie in the modules' weights; what they share counts once."""
    weights = {weight.data_ptr(): weight for module in modules for weight in module.parameters()}
    gradients = [weight.grad for weight in weights.values() if weight.grad is not None]
    return sum(gradient.numel() * gradient.element_size() for gradient in gradients)


@contextlib.contextmanager
def counted(unet: nn.Module, rows: int) -> Iterator[dict[str, float]]:
    """Count a UNet's work on a batch of `rows` guided samples, in forwards of one guided step of all of them.

    `forwards` and `recomputed` as called; `backwards` cost one each for the gradient to the input, and one more where
    weights get one.
    """
    work = {"forwards": 0.0, "backwards": 0.0}
    weights = any(parameter.requires_grad for parameter in unet.parameters())

    def on_call(module: nn.Module, inputs: Any, output: Any) -> None:
        share = len(output.sample) / (2 * rows)
        work["forwards"] += share
        if output.sample.requires_grad:

            def on_gradient(gradient: Tensor) -> None:
                work["backwards"] += share * (2 if weights else 1)

            output.sample.register_hook(on_gradient)

    hook = unet.register_forward_hook(on_call)
    try:
        yield work
    finally:
        hook.remove()


def spread(gradients: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The largest relative difference |ours - theirs| / |theirs| of any tensor (2-norms).

    A tensor with less than a millionth of the whole gradient is left out: it is zero in exact arithmetic (a key's bias,
    which softmax cannot see), and what is left of it is rounding.
    """
    norms = [(float((ours - theirs).norm()), float(theirs.norm())) for ours, theirs in gradients]
    whole = sum(norm**2 for _, norm in norms) ** 0.5
    return max(difference / norm for difference, norm in norms if norm > 1e-6 * whole)
