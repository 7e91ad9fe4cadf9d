"""Launches through the CUDA driver API, faster than Triton's if only the addresses change."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

_SPARE = 4
"""Zeros after the known parameters: Triton passes pointers to scratch memory, which these kernels do not use."""

_INVALID_CONTEXT = 201


@cache
def _cu_launch_kernel() -> Any:
    """`cuLaunchKernel` of the driver API; None if the library is not available."""
    try:
        return ctypes.CDLL("libcuda.so.1").cuLaunchKernel
    except OSError:
        return None


class DriverLaunch:
    """One kernel and grid, for repeated launches. Not thread-safe.

    Args:
        compiled: a `triton.compiler.CompiledKernel` that was launched once; see `can_launch`.
        grid: number of programs in three dimensions.
        num_pointers: number of pointers, which are the first parameters of the kernel.
        numbers: parameters after the pointers.
        through_triton: the same launch by Triton, for a thread without a current CUDA context.
    """

    def __init__(
        self,
        compiled: Any,
        grid: tuple[int, int, int],
        num_pointers: int,
        numbers: Sequence[int | float],
        through_triton: Callable[[list[int], int], None],
    ) -> None:
        self._through_triton = through_triton
        self._launch = _cu_launch_kernel()
        self._name = compiled.name
        self._pointers = (ctypes.c_uint64 * num_pointers)()
        self._numbers = [
            ctypes.c_float(number) if kind == "fp32" else ctypes.c_int32(number)
            for number, kind in zip(numbers, _kinds(compiled)[num_pointers:])
        ]
        self._spare = (ctypes.c_uint64 * _SPARE)()
        places = [ctypes.addressof(self._pointers) + 8 * index for index in range(num_pointers)]
        places += [ctypes.addressof(number) for number in self._numbers]
        places += [ctypes.addressof(self._spare) + 8 * index for index in range(_SPARE)]
        self._parameters = (ctypes.c_void_p * len(places))(*places)
        metadata = compiled.metadata
        self._shape = (
            ctypes.c_void_p(compiled.function),
            *[ctypes.c_uint(number) for number in (*grid, 32 * metadata.num_warps, 1, 1, metadata.shared)],
        )

    def __call__(self, addresses: list[int], stream: int) -> None:
        """Queues the kernel.

        Raises:
            RuntimeError: the driver returned an error.
        """
        self._pointers[:] = addresses
        status = self._launch(*self._shape, ctypes.c_void_p(stream), self._parameters, None)
        if status == _INVALID_CONTEXT:
            self._through_triton(addresses, stream)  # makes a context current
        elif status:
            raise RuntimeError(f"{self._name}: cuLaunchKernel failed with CUDA error {status}.")


def _kinds(compiled: Any) -> list[str]:
    return [kind for kind in compiled.src.signature.values() if kind != "constexpr"]


def can_launch(compiled: Any, num_pointers: int, numbers: Sequence[int | float]) -> bool:
    """Whether `DriverLaunch` supports a binary; Triton launches the others."""
    metadata = getattr(compiled, "metadata", None)
    if metadata is None or not isinstance(getattr(compiled, "function", None), int) or _cu_launch_kernel() is None:
        return False
    kinds = _kinds(compiled)
    special = ("launch_cooperative_grid", "launch_pdl", "global_scratch_size", "profile_scratch_size")
    return (
        metadata.target.backend == "cuda"
        and metadata.num_ctas == 1
        and not any(getattr(metadata, name, False) for name in special)
        and all(kind.startswith("*") for kind in kinds[:num_pointers])
        and kinds[num_pointers:] == ["fp32" if isinstance(number, float) else "i32" for number in numbers]
    )
