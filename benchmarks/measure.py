"""Time and memory of one layer.

On a GPU, a call is timed between two CUDA events while the host runs ahead. The result is the device time, or the host
time if the call is launch-bound. On a CPU, it is wall clock time.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from arms import Layer
from shapes import Inputs
from torch.utils.checkpoint import checkpoint

MODES = ("fwd", "fwd+bwd", "fwd+bwd+ckpt")
"""Forward under no_grad; forward and all gradients; the same with recomputation in the backward."""

LAUNCHED_TOKENS = 128
"""Largest number of tokens for which launches from Python and replays of a CUDA graph are timed too."""

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of a call: median, 20th and 80th percentile."""

    ms: float
    ms_p20: float
    ms_p80: float


@dataclass(frozen=True)
class Memory:
    """Memory of a call in MiB, relative to the memory before.

    Args:
        peak_mib: peak, including gradients.
        held_mib: memory saved for the backward: allocated after the forward, without the output. None for a forward
            only.
    """

    peak_mib: float
    held_mib: float | None


@torch.no_grad()
def forward(layer: Layer, inputs: Inputs) -> torch.Tensor:
    return layer.module(*inputs.arguments)


def _clear_gradients(layer: Layer, inputs: Inputs) -> None:
    for tensor in (*inputs.leaves.values(), *layer.parameters):
        tensor.grad = None


def train_step(
    layer: Layer,
    inputs: Inputs,
    checkpointing: bool = False,
    after_forward: Callable[[torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """One forward and backward; returns the output, gradients are in `.grad`."""
    _clear_gradients(layer, inputs)
    if checkpointing:
        out = checkpoint(layer.module, *inputs.arguments, use_reentrant=False)
    else:
        out = layer.module(*inputs.arguments)
    if after_forward is not None:
        after_forward(out)
    out.backward(inputs.cotangent)
    return out


def step(mode: str) -> Callable[..., torch.Tensor]:
    """The function of a mode, to be called with layer and inputs."""
    return forward if mode == "fwd" else partial(train_step, checkpointing=mode.endswith("ckpt"))


def _to_timing(samples: list[float]) -> Timing:
    if len(samples) == 1:
        samples = samples * 2
    low, *_, high = statistics.quantiles(samples, n=5, method="inclusive")
    return Timing(statistics.median(samples), low, high)


def time_calls(calls: Sequence[Call], device: torch.device, repeats: int, warmup: int) -> Timing:
    """Times `repeats` single calls, using `calls` in turns, after `warmup` untimed calls and all calls once."""
    for index in range(max(warmup, len(calls))):
        calls[index % len(calls)]()
    if device.type != "cuda":
        return _to_timing([_wall_clock_ms(calls[index % len(calls)]) for index in range(repeats)])
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    torch.cuda.synchronize(device)
    for index, (start, end) in enumerate(events):
        start.record()
        calls[index % len(calls)]()
        end.record()
    torch.cuda.synchronize(device)
    return _to_timing([start.elapsed_time(end) for start, end in events])


def _wall_clock_ms(call: Call) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def time_launched(calls: Sequence[Call], device: torch.device, repeats: int) -> float:
    """Milliseconds of wall clock time per call, for many calls back to back: maximum of host and device time."""

    def all_calls() -> None:
        for index in range(repeats):
            calls[index % len(calls)]()
        torch.cuda.synchronize(device)

    torch.cuda.synchronize(device)
    return _wall_clock_ms(all_calls) / repeats


def time_graph(calls: Sequence[Call], device: torch.device, repeats: int) -> float:
    """Milliseconds of device time per call: median of the replays of one CUDA graph with all `calls`.

    Raises:
        RuntimeError: a call cannot be captured; the error has the reason.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        _capture(graph, calls, device)
    except RuntimeError as error:
        _forget_capture(device)
        raise RuntimeError(_first_cause(error)) from error
    return time_calls([graph.replay], device, repeats, warmup=3).ms / len(calls)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """A cached stream, since libraries allocate a permanent workspace for every stream."""
    return torch.cuda.Stream(device)


def _capture(graph: torch.cuda.CUDAGraph, calls: Sequence[Call], device: torch.device) -> None:
    stream = _side_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for call in calls:  # initialization per stream
            call()
        torch.cuda.synchronize(device)
        # a graph uses separate memory, and cached memory cannot be freed during the capture
        gc.collect()
        torch.cuda.empty_cache()
        # `torch.cuda.graph` would leave its stream current after a failed capture
        graph.capture_begin()
        try:
            for call in calls:
                call()
        finally:
            graph.capture_end()
    torch.cuda.current_stream(device).wait_stream(stream)


def _forget_capture(device: torch.device) -> None:
    """Resets torch's default generator, which a failed capture leaves in the state of a capture."""
    torch.cuda.synchronize(device)
    index = torch.cuda.current_device() if device.index is None else device.index
    state = torch.Generator(device).graphsafe_get_state()
    torch.cuda.default_generators[index].graphsafe_set_state(state)


def _first_cause(error: BaseException) -> str:
    """The first line of the original error in a chain of errors."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else type(error).__name__


def measure_memory(layer: Layer, inputs: Inputs, mode: str) -> Memory | None:
    """Measures memory; None on a device without memory statistics."""
    device = inputs.hidden_states.device
    if device.type != "cuda":
        return None
    _clear_gradients(layer, inputs)
    gc.collect()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    held = None
    if mode == "fwd":
        forward(layer, inputs)
    else:

        def note_held(out: torch.Tensor) -> None:
            nonlocal held
            held = (torch.cuda.memory_allocated(device) - before - out.nbytes) / 2**20

        step(mode)(layer, inputs, after_forward=note_held)
    torch.cuda.synchronize(device)
    peak = (torch.cuda.max_memory_allocated(device) - before) / 2**20
    _clear_gradients(layer, inputs)
    return Memory(peak, held)
