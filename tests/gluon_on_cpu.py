"""Runs Gluon kernels as plain Python on CPU tensors, since Triton's interpreter does not.

The functions of a kernel are executed with other globals, in which Gluon's operations work on simulated values.
Besides values, this shows mistakes in the order of accesses:

- Groups of warps take turns in a random order, changed at each operation on a barrier. If all wait, it is an error.
- The target of an asynchronous copy has arbitrary contents until the copy arrives, as has fresh shared memory.
- A matrix product reads its operands when it is waited for.

What the compiler checks is not checked here, for example whether the conversion of a layout is trivial. Nor are
missing barriers within a group of warps noticed, since it runs as one.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from types import FunctionType
from typing import Any

import torch
import triton.language as tl
from gluon_values import LANGUAGE, TORCH_TYPES, Pointer, Shared, Tensor, load, number, poison, run_assembly
from ptx_in_numpy import SharedVariables
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from peft_moe_qlora.ops.kernels.specialized_copy import copy_async


class _Barrier:
    """An mbarrier: a phase is complete after `count` arrivals, and the next one begins."""

    def __init__(self, count: int) -> None:
        self.count = self.pending = count
        self.phases = 0

    def arrive(self, count: int) -> None:
        if count > self.pending:
            raise RuntimeError(f"{count} arrivals at a barrier that waits for {self.pending} of {self.count}")
        self.pending -= count
        if self.pending == 0:
            self.pending = self.count
            self.phases += 1


class _Warps:
    """A group of warps: a thread that runs only between `resume` and its next `pause`."""

    def __init__(self, run: Callable[[], Any], num_warps: int) -> None:
        self.num_warps = num_warps
        self.is_ready: Callable[[], bool] = lambda: True
        self.is_done = self._is_stopped = False
        self.is_fenced = True
        self.copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._run, self._error = run, None
        self._turn, self._back = threading.Semaphore(0), threading.Semaphore(0)
        threading.Thread(target=self._main, daemon=True).start()

    def _main(self) -> None:
        try:
            self._await_turn()
            self._run()
        except BaseException as error:
            self._error = error
        self.is_done = True
        self._back.release()

    def _await_turn(self) -> None:
        self._turn.acquire()
        if self._is_stopped:
            raise SystemExit

    def resume(self) -> None:
        self._turn.release()
        self._back.acquire()
        if self._error is not None and not self._is_stopped:
            raise self._error

    def pause(self, is_ready: Callable[[], bool]) -> None:
        self.is_ready = is_ready
        self._back.release()
        self._await_turn()

    def stop(self) -> None:
        self._is_stopped = True
        if not self.is_done:
            self.resume()


class _Operations:
    """What stands for a module of Gluon's operations: its types and data types, and some functions."""

    def __init__(self, module: Any, **functions: Callable) -> None:
        self._module = module
        vars(self).update(functions)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        if not isinstance(value, (type, tl.dtype)):
            raise NotImplementedError(f"{name} is not simulated")
        return value


class _Program:
    """One program of a launch."""

    def __init__(self, index: int, num_programs: int, num_warps: int) -> None:
        self._num_warps = num_warps
        self._random = random.Random(index)
        self._barriers: dict[int, _Barrier] = {}
        self._memory: list[Shared] = []  # keeps the addresses of barriers
        self._landing: deque[tuple[list, _Barrier, int]] = deque()
        self._warps: _Warps | None = None
        self._globals: dict[int, dict[str, Any]] = {}
        language = {
            **LANGUAGE,
            "program_id": lambda axis: number(index),
            "num_programs": lambda axis: number(num_programs),
            "allocate_shared_memory": self._allocate,
            "inline_asm_elementwise": partial(run_assembly, variables=SharedVariables()),
            "warp_specialize": self._specialize,
        }
        barrier = {"init": self._init, "wait": self._wait, "arrive": self._arrive}
        copy = {"mbarrier_arrive": self._arrive_after_copies}
        self._replaced = {
            id(gl): _Operations(gl, **language),
            id(tl): _Operations(tl, **language),
            id(hopper.mbarrier): _Operations(hopper.mbarrier, **barrier),
            id(hopper.async_copy): _Operations(hopper.async_copy, **copy),
            id(copy_async): self._copy,
            id(hopper.fence_async_shared): self._fence,
            id(hopper.warpgroup_mma): self._multiply,
            id(hopper.warpgroup_mma_wait): self._wait_for_products,
        }

    def run(self, kernel: JITFunction, *arguments: Any, **constants: Any) -> None:
        self._simulated(kernel)(*arguments, **constants)
        while self._landing:
            self._land()
        if any(barrier.pending != barrier.count for barrier in self._barriers.values()):
            raise RuntimeError("a phase of a barrier is not complete at the end")

    def _simulated(self, value: Any) -> Any:
        """What a global of a kernel's module is during simulation."""
        if isinstance(value, tl.constexpr):
            return value.value
        if isinstance(value, (JITFunction, InterpretedFunction)):
            function = value.fn
            return FunctionType(
                function.__code__, self._globals_of(function), None, function.__defaults__, function.__closure__
            )
        return self._replaced.get(id(value), value)

    def _globals_of(self, function: FunctionType) -> dict[str, Any]:
        module = function.__globals__
        if id(module) not in self._globals:
            self._globals[id(module)] = found = {}
            found.update((name, self._simulated(value)) for name, value in module.items())
            found["range"] = LANGUAGE["range"]
        return self._globals[id(module)]

    def _allocate(self, dtype: tl.dtype, shape: Sequence[int], layout: Any) -> Shared:
        found = Shared(torch.empty(shape, dtype=TORCH_TYPES[dtype]), layout)
        poison(found.data)
        self._memory.append(found)
        return found

    def _specialize(
        self, parts: Sequence[tuple], worker_warps: Sequence[int], worker_registers: Sequence[int]
    ) -> None:
        groups = [
            _Warps(partial(function, *arguments), num_warps)
            for (function, arguments), num_warps in zip(parts, [self._num_warps, *worker_warps], strict=True)
        ]
        try:
            while not all(group.is_done for group in groups):
                # None: copies complete
                ready = [group for group in groups if not group.is_done and group.is_ready()]
                ready += [None] * bool(self._landing)
                if not ready:
                    raise RuntimeError("deadlock: all groups of warps wait for a barrier")
                self._warps = self._random.choice(ready)
                self._land() if self._warps is None else self._warps.resume()
        finally:
            for group in groups:
                group.stop()

    def _land(self) -> None:
        """Completes the copies that were started first."""
        copies, barrier, count = self._landing.popleft()
        for target, values in copies:
            target.copy_(values)
        barrier.arrive(count)

    def _barrier(self, place: Shared) -> _Barrier:
        return self._barriers[place.data.data_ptr()]

    def _init(self, place: Shared, count: int) -> None:
        self._barriers[place.data.data_ptr()] = _Barrier(int(count))

    def _wait(self, place: Shared, phase: Any) -> None:
        barrier, parity = self._barrier(place), int(phase)
        self._warps.pause(lambda: barrier.phases % 2 != parity)
        self._warps.is_fenced = False

    def _arrive(self, place: Shared, count: int = 1, pred: Any = True) -> None:
        if pred:
            self._barrier(place).arrive(count)
        self._warps.pause(lambda: True)

    def _copy(self, target: Shared, pointer: Pointer, mask: Tensor | None = None) -> None:
        values = load(pointer, mask, 0)
        if values.shape != target.shape or values.dtype != target.dtype:
            raise TypeError(f"{values.dtype} {values.shape} does not fit in {target.dtype} {target.shape}")
        poison(target.data)
        self._warps.copies.append((target.data, values.data))

    def _arrive_after_copies(self, place: Shared, increment_count: bool = True) -> None:
        """All threads arrive when their copies have."""
        if increment_count:
            raise NotImplementedError("arrivals that the barrier does not count")
        self._landing.append((self._warps.copies, self._barrier(place), 32 * self._warps.num_warps))
        self._warps.copies = []
        self._warps.pause(lambda: True)

    def _fence(self) -> None:
        self._warps.is_fenced = True

    def _multiply(self, a: Any, b: Shared, acc: Tensor, is_async: bool = False) -> Callable[[], Tensor]:
        if not is_async:
            raise NotImplementedError("products without a wait")
        if not self._warps.is_fenced:
            raise RuntimeError("a product of shared memory without a fence after the barrier")
        return lambda: Tensor(acc.data + a.data.float() @ b.data.float(), acc.layout)

    def _wait_for_products(self, num_outstanding: int = 0, deps: Sequence[Any] = ()) -> list[Any]:
        if num_outstanding:
            raise NotImplementedError("products that are not waited for")
        return [value() if callable(value) else value for value in deps]


def launch_on_cpu(
    kernel: JITFunction,
    grid: tuple[int, ...],
    tensors: tuple[torch.Tensor, ...],
    numbers: tuple[int, ...],
    num_warps: int = 4,
    **options: Any,
) -> None:
    """Replaces `launch`: runs one program after the other; options of the compiler have no effect."""
    names = kernel.arg_names
    pointers = [Pointer.to_tensor(*one) for one in zip(names, tensors)]
    constants = {name: options[name] for name in names[len(tensors) + len(numbers) :]}
    for index in range(grid[0]):
        _Program(index, grid[0], num_warps).run(kernel, *pointers, *map(number, numbers), **constants)
