"""Optimizers by name, and the cost of their steps."""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from step_times import GIB
from torch import nn

Parameters = Iterable[nn.Parameter]
Make = Callable[..., torch.optim.Optimizer]


def _made(module: str, name: str, parameters: Parameters, lr: float, **options) -> torch.optim.Optimizer:
    return getattr(importlib.import_module(module), name)(parameters, lr=lr, **options)


OPTIMIZERS: dict[str, Make] = {
    "adamw": partial(_made, "torch.optim", "AdamW"),
    "adamw-fused": partial(_made, "torch.optim", "AdamW", fused=True),
    "adamw8bit": partial(_made, "bitsandbytes.optim", "AdamW8bit"),
    "adamw8bit-unsynced": partial(_made, "peft_moe_qlora.training", "UnsyncedAdamW8bit"),
    "paged-adamw8bit": partial(_made, "bitsandbytes.optim", "PagedAdamW8bit"),
    "paged-adamw": partial(_made, "bitsandbytes.optim", "PagedAdamW"),
    "torchao-8bit": partial(_made, "torchao.optim", "AdamW8bit"),
    "torchao-4bit": partial(_made, "torchao.optim", "AdamW4bit"),
    "torchao-fp8": partial(_made, "torchao.optim", "AdamWFp8"),
    "adafactor": partial(_made, "torch.optim", "Adafactor"),
}
"""Name -> function `(parameters, lr, **options)` -> optimizer, with the optimizer's default weight decay."""


def make_optimizer(name: str, parameters: Parameters, lr: float, **options: object) -> torch.optim.Optimizer:
    """Creates an optimizer by name; the options are those of its class.

    Raises:
        ImportError: its package is not installed.
    """
    try:
        return OPTIMIZERS[name](parameters, lr, **options)
    except ModuleNotFoundError as error:
        raise ImportError(f"The optimizer {name} requires {error.name}, which is not installed.") from error


@dataclass(frozen=True)
class OptimizerCost:
    """Cost of one step.

    Args:
        optimizer: name of the optimizer.
        parameters: number of trained values.
        milliseconds: median wall clock time.
        host_milliseconds: median time until all kernels are launched.
        state_gib: optimizer state on the device.
        paged_gib: optimizer state in memory that is paged between device and host.
        peak_gib: peak memory of a step in addition to factors, gradients and state.
        difference: relative difference from torch's AdamW of the updates of three steps on 3-D factors.
    """

    optimizer: str
    parameters: int
    milliseconds: float
    host_milliseconds: float
    state_gib: float
    paged_gib: float
    peak_gib: float
    difference: float


def optimizer_cost(
    name: str, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device, steps: int
) -> OptimizerCost:
    """Times an optimizer on factors of these shapes, with random gradients.

    Raises:
        ImportError: its package is not installed.
    """
    on_gpu = device.type == "cuda"
    parameters = _random_parameters(shapes, dtype, device)
    optimizer = make_optimizer(name, parameters, 1e-5)
    before = torch.cuda.memory_allocated() if on_gpu else 0
    optimizer.step()
    if on_gpu:
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    on_wall, on_host = [], []
    for _ in range(steps):
        start = time.perf_counter()
        optimizer.step()
        launched = time.perf_counter()
        if on_gpu:
            torch.cuda.synchronize()
        on_wall.append(1e3 * (time.perf_counter() - start))
        on_host.append(1e3 * (launched - start))
    paged, plain = _state_bytes(optimizer)
    return OptimizerCost(
        optimizer=name,
        parameters=sum(parameter.numel() for parameter in parameters),
        milliseconds=statistics.median(on_wall),
        host_milliseconds=statistics.median(on_host),
        # the allocator's statistics include memory of tensor subclasses
        state_gib=(held - before if on_gpu else plain) / GIB,
        paged_gib=paged / GIB,
        peak_gib=(torch.cuda.max_memory_allocated() - held) / GIB if on_gpu else 0.0,
        difference=_difference_to_adamw(name, device),
    )


def _random_parameters(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device, seed: int = 0
) -> list[nn.Parameter]:
    generator = torch.Generator(device).manual_seed(seed)
    parameters = []
    for shape in shapes:
        value, gradient = (0.02 * torch.randn(shape, generator=generator, device=device) for _ in range(2))
        parameters.append(nn.Parameter(value.to(dtype)))
        parameters[-1].grad = gradient.to(dtype)
    return parameters


def _state_bytes(optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """Bytes of paged state and of other state."""
    found = [0, 0]
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor):
                found[0 if getattr(value, "is_paged", False) else 1] += value.nbytes
    return found[0], found[1]


def _difference_to_adamw(name: str, device: torch.device) -> float:
    # large enough for 8-bit states of bitsandbytes
    shapes = [(4, 16, 128), (4, 96, 16)]

    def change(make: Callable[[Parameters], torch.optim.Optimizer]) -> torch.Tensor:
        parameters = _random_parameters(shapes, torch.float32, device)
        before = [parameter.detach().clone() for parameter in parameters]
        optimizer = make(parameters)
        for _ in range(3):
            optimizer.step()
        return torch.cat([(new.detach() - old).flatten() for new, old in zip(parameters, before)])

    expected = change(lambda parameters: torch.optim.AdamW(parameters, lr=1e-3))
    found = change(lambda parameters: make_optimizer(name, parameters, 1e-3))
    return float((found - expected).norm() / expected.norm())
