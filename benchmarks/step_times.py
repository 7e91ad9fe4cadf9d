"""Time and memory of a training step: wall clock, device and host time, and device time by category."""

from __future__ import annotations

import cProfile
import pstats
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from kernel_categories import (
    CATEGORIES,
    HEAD,
    OPTIMIZER,
    Kernels,
    KernelTime,
    by_category,
    is_annotation,
    total,
    unclassified,
    without,
)
from peft import PeftModel
from step_models import head_alone
from torch.profiler import ProfilerActivity, profile

GIB = 2**30
_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaLaunchCooperativeKernel")


class Training:
    """A model, its optimizer, and batches of random tokens, which depend only on the seed.

    Args:
        model: the model with its adapter.
        optimizer: optimizer of the factors.
        batch: number of sequences.
        tokens: tokens per sequence.
        batches: number of batches, used in turns; None for a new batch in every step.
        seed: seed of the tokens.
    """

    def __init__(
        self,
        model: PeftModel,
        optimizer: torch.optim.Optimizer,
        batch: int,
        tokens: int,
        batches: int | None = None,
        seed: int = 0,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.size = (batch, tokens)
        self.device = model.get_base_model().lm_head.weight.device
        self.vocabulary = model.get_base_model().config.vocab_size
        self._generator = torch.Generator(self.device).manual_seed(seed)
        self._batches = None if batches is None else [self._draw() for _ in range(batches)]
        self._index = 0

    def _draw(self) -> torch.Tensor:
        return torch.randint(0, self.vocabulary, self.size, device=self.device, generator=self._generator)

    def _ids(self) -> torch.Tensor:
        if self._batches is None:
            return self._draw()
        self._index += 1
        return self._batches[(self._index - 1) % len(self._batches)]

    def gradients(self) -> torch.Tensor:
        """Runs forward, loss and backward; returns the loss."""
        ids = self._ids()
        loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.detach()

    def update(self) -> None:
        self.optimizer.step()

    def step(self) -> torch.Tensor:
        """Runs a whole step; returns the loss."""
        loss = self.gradients()
        self.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def head(self) -> Callable[[], None]:
        """Function that runs forward and backward of only head and loss."""
        config = self.model.get_base_model().config
        dtype = self.model.get_base_model().lm_head.weight.dtype
        hidden_states = torch.randn(*self.size, config.hidden_size, device=self.device, dtype=dtype).requires_grad_()
        head, ids = head_alone(self.model, hidden_states), self._draw()

        def call() -> None:
            head(input_ids=ids, labels=ids).loss.backward()
            hidden_states.grad = None

        return call

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class StepTime:
    """Results of the timed steps; memory is 0 on a CPU.

    Args:
        milliseconds: median wall clock time.
        least_milliseconds: time of the fastest step.
        host_milliseconds: median time until all kernels of a step are launched.
        peak_gib: peak of allocated memory.
        warmup_peak_gib: peak of allocated memory in the untimed steps before, including captures.
        reserved_gib: peak of memory reserved by torch.
        device_gib: memory in use on the device at the end, including context and graphs.
        loss: loss of the last step.
    """

    milliseconds: float
    least_milliseconds: float
    host_milliseconds: float
    peak_gib: float
    warmup_peak_gib: float
    reserved_gib: float
    device_gib: float
    loss: float


def time_steps(training: Training, steps: int, warmup: int) -> StepTime:
    on_gpu = training.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(warmup):
        training.step()
    training.wait()
    warmup_peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    on_wall, on_host = [], []
    for _ in range(steps):
        start = time.perf_counter()
        loss = training.step()
        launched = time.perf_counter()
        training.wait()
        on_wall.append(1e3 * (time.perf_counter() - start))
        on_host.append(1e3 * (launched - start))
    free, size = torch.cuda.mem_get_info() if on_gpu else (0, 0)
    return StepTime(
        milliseconds=statistics.median(on_wall),
        least_milliseconds=min(on_wall),
        host_milliseconds=statistics.median(on_host),
        peak_gib=torch.cuda.max_memory_allocated() / GIB if on_gpu else 0.0,
        warmup_peak_gib=warmup_peak / GIB,
        reserved_gib=torch.cuda.max_memory_reserved() / GIB if on_gpu else 0.0,
        device_gib=(size - free) / GIB,
        loss=float(loss),
    )


@dataclass(frozen=True)
class Split:
    """Device time of one step by category.

    Args:
        milliseconds: time of all kernels, including copies between memories.
        by_category: time by category of the kernels.
        other: the slowest kernels without a category: name, milliseconds, launches.
        kernels: number of kernels.
        launches: number of launches by the host; a CUDA graph counts as one.
    """

    milliseconds: float
    by_category: dict[str, float]
    other: list[tuple[str, float, int]]
    kernels: int
    launches: int


def split_step(training: Training) -> Split:
    """Profiles one step, on a GPU.

    The optimizer is profiled separately. Head and loss are also profiled separately, and their kernels are subtracted
    from the others by name, since linear layers use the same kernels.
    """
    whole, launches = _profiled(training.gradients)
    optimizer, of_optimizer = _profiled(training.update)
    training.optimizer.zero_grad(set_to_none=True)
    head_call = training.head()
    head_call()
    head, _ = _profiled(head_call)
    rest = without(whole, head)
    found = by_category(rest)
    found[HEAD] = found.get(HEAD, 0.0) + total(whole) - total(rest)
    found[OPTIMIZER] = found.get(OPTIMIZER, 0.0) + total(optimizer)
    return Split(
        milliseconds=total(whole) + total(optimizer),
        by_category={name: found[name] for name in CATEGORIES if found.get(name)},
        other=unclassified(rest),
        kernels=sum(time.count for kernels in (whole, optimizer) for time in kernels.values()),
        launches=launches + of_optimizer,
    )


def _profiled(call: Callable[[], object]) -> tuple[Kernels, int]:
    """Kernels of a call, and the number of launches by the host."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as run:
        call()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = {}
    launches = 0
    for event in run.events():
        if event.device_type != torch.autograd.DeviceType.CUDA:
            launches += event.name.startswith(_LAUNCHES)
        elif not (event.is_user_annotation or is_annotation(event.name)):
            found.setdefault(event.name, []).append(event.device_time / 1e3)
    return {name: KernelTime(sum(times), len(times)) for name, times in found.items()}, launches


@dataclass(frozen=True)
class HostCall:
    """A function of Python or C in one step: milliseconds without called functions, and number of calls."""

    name: str
    milliseconds: float
    calls: int


def host_calls(training: Training, number: int = 25) -> list[HostCall]:
    """The functions with the most host time in a step; times include the overhead of the profiler."""
    recorder = cProfile.Profile()
    # run the backward in this thread, since only this thread is recorded
    with torch.autograd.set_multithreading_enabled(False):
        recorder.enable()
        training.step()
        recorder.disable()
    training.wait()
    rows = [
        HostCall(_shown(*place), 1e3 * own, calls)
        for place, (_, calls, own, _, _) in pstats.Stats(recorder).stats.items()
    ]
    return sorted(rows, key=lambda row: -row.milliseconds)[:number]


def _shown(file: str, line: int, name: str) -> str:
    return name if file == "~" else f"{'/'.join(file.split('/')[-2:])}:{line} {name}"
