"""Measurements of a training step: seconds, peak memory, UNet forwards, difference of gradients."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def seconds(step: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Wall seconds and CPU seconds of this process for one call. Wall seconds include the work of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started, worked = time.perf_counter(), time.process_time()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started, time.process_time() - worked


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Peak memory of the tensors that one call allocates, in bytes above what was allocated before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return int(torch.cuda.max_memory_allocated(device)) - before
    # torch tracks no peak on the CPU, but its profiler records each allocation. Resident memory would count caches too.
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
    """Bytes of the parameters and buffers of the modules. Shared tensors count once."""
    tensors = {t.data_ptr(): t for module in modules for t in (*module.parameters(), *module.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def gradient_bytes(modules: Iterable[nn.Module]) -> int:
    """Bytes of the gradients stored in the modules' parameters. Shared parameters count once."""
    weights = {weight.data_ptr(): weight for module in modules for weight in module.parameters()}
    gradients = [weight.grad for weight in weights.values() if weight.grad is not None]
    return sum(gradient.numel() * gradient.element_size() for gradient in gradients)


@contextlib.contextmanager
def count_unet_work(unet: nn.Module, rows: int) -> Iterator[dict[str, float]]:
    """Count a UNet's forward and backward passes, in units of one guided forward pass of `rows` samples.

    `forwards` includes recomputed ones. A backward pass costs one unit for the gradient of the input, and another where
    weights get a gradient.
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


def largest_relative_difference(gradients: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The largest |ours - theirs| / |theirs| of any tensor (2-norms).

    Tensors with less than a millionth of the total gradient norm are skipped: they are zero in exact arithmetic (a
    key's bias does not change a softmax), so only rounding is left of them.
    """
    norms = [(float((ours - theirs).norm()), float(theirs.norm())) for ours, theirs in gradients]
    total = sum(norm**2 for _, norm in norms) ** 0.5
    return max(difference / norm for difference, norm in norms if norm > 1e-6 * total)
