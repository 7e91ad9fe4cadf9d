"""Kernel launches in a few microseconds.

`kernel[grid](...)` inspects every argument to select a binary, which takes longer than most of these kernels run. The
caller knows what the binary depends on, so it is looked up only once.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, reduce
from operator import attrgetter, or_
from typing import Any

import torch

from .driver import DriverLaunch, can_launch
from .launch_recorder import active_recorder

_address_of = torch.Tensor.data_ptr
_dtype_of = attrgetter("dtype")


def cdiv(numerator: int, denominator: int) -> int:
    # Triton's cdiv takes as long as a launch
    return -(-numerator // denominator)


def next_power_of_2(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


_compiled: dict[tuple, Any] = {}


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: tuple[torch.Tensor, ...],
    numbers: tuple[int | float, ...],
    num_warps: int = 4,
    num_stages: int = 3,
    enable_fp_fusion: bool = True,
    maxnreg: int | None = None,
    **constants: Any,
) -> None:
    """Runs a Triton kernel on the current device and stream.

    Args:
        kernel: kernel whose parameters are pointers, numbers without specialization, and constants, in this order.
        grid: numbers of programs.
        tensors: tensors for the pointers.
        numbers: 32-bit integers and floats.
        num_warps: number of warps of 32 threads.
        num_stages: number of loads in flight.
        enable_fp_fusion: round a product and a sum once; must be False for results that are bit-identical to torch's.
        maxnreg: largest number of registers of a thread; None for no limit.
        constants: values of the `tl.constexpr` parameters, in the order of the kernel.
    """
    values = tuple(constants.values())
    addresses = reduce(or_, map(_address_of, tensors))
    dtypes = (*map(_dtype_of, tensors), *map(type, numbers))
    key = (kernel, tensors[0].device, dtypes, addresses % 16 == 0, values, num_warps, num_stages, maxnreg)
    compiled = _compiled.get(key)
    recorder = active_recorder()
    if compiled is not None:
        compiled[(*grid, 1, 1)[:3]](*tensors, *numbers, *values)
        if recorder is not None:
            recorder.add_launch(_launcher(compiled, grid, len(tensors), numbers, values), tensors)
        return
    names = kernel.arg_names
    if list(constants) != names[len(tensors) + len(numbers) :]:
        raise TypeError(f"{kernel} takes {names}, found {len(tensors)} tensors, {len(numbers)} numbers, {constants}.")
    compiled = kernel[grid](
        *tensors,
        *numbers,
        *values,
        num_warps=num_warps,
        num_stages=num_stages,
        enable_fp_fusion=enable_fp_fusion,
        maxnreg=maxnreg,
    )
    # a binary for unaligned pointers may not be valid for others; the interpreter returns None
    if addresses % 16 == 0:
        _compiled[key] = compiled
    if recorder is not None:
        recorder.add_launch(_launcher(compiled, grid, len(tensors), numbers, values), tensors)


def _launcher(
    compiled: Any, grid: tuple[int, ...], num_tensors: int, numbers: tuple[int | float, ...], values: tuple
) -> Callable[[list[int], int], None]:
    """Returns a function that launches a binary with other addresses."""
    whole_grid = (*grid, 1, 1)[:3]
    run = compiled[whole_grid]

    def through_triton(addresses: list[int], stream: int) -> None:
        run(*addresses, *numbers, *values, stream=stream)

    if can_launch(compiled, num_tensors, numbers):
        return DriverLaunch(compiled, whole_grid, num_tensors, numbers, through_triton)
    return through_triton


def device_of(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Context manager that makes the device of a tensor current, since kernels launch on the current device."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


@cache
def has_much_shared_memory(device: torch.device) -> bool:
    """Whether a program can use 200 KiB, as on compute capability 9.0 and 10.0; on others it can use about 100 KiB."""
    return (
        device.type == "cuda" and torch.cuda.get_device_properties(device).shared_memory_per_block_optin >= 200 * 2**10
    )
