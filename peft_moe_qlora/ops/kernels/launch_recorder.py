"""A sequence of allocations and launches, recorded once and replayed with other tensors.

For given shapes, a layer always allocates the same tensors and launches the same kernels; the Python code for that
takes longer than a small layer runs. A recorder stores the sequence with addresses relative to inputs and allocations.
A replay is an ordinary sequence of launches on the current stream: it allocates each time, and can be captured in a
CUDA graph.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from functools import reduce
from itertools import pairwise
from operator import or_
from typing import Any

import torch

MOST_RECORDINGS = 1024
"""Limit on the number of recordings, one per sequence length; the oldest is dropped first."""

_local = threading.local()
_lock = threading.Lock()
_recordings: dict[Hashable, LaunchRecorder] = {}

Outputs = list[torch.Tensor | None]


class LaunchRecorder:
    """Records from its creation to `finish`, in the thread in which it is the `active_recorder`.

    Args:
        inputs: tensors that are not allocated during recording; None for absent ones.
    """

    def __init__(self, inputs: Sequence[torch.Tensor | None]) -> None:
        self.extra: Any = None
        self._device = next(tensor.device for tensor in inputs if tensor is not None)
        self._lock = threading.Lock()
        self._steps: list[tuple] = []
        self._spans: list[tuple[int, int]] = []
        self._outputs: list[int | None] = []
        for tensor in inputs:
            self._add_span(tensor)

    def _add_span(self, tensor: torch.Tensor | None) -> int:
        start = 0 if tensor is None else tensor.data_ptr()
        self._spans.append((start, start if tensor is None else start + tensor.nbytes))
        return len(self._spans) - 1

    def has_overlapping_inputs(self) -> bool:
        spans = sorted(span for span in self._spans if span[1] > span[0])
        return any(end > following for (_, end), (following, _) in pairwise(spans))

    def add_allocation(self, tensor: torch.Tensor) -> None:
        self._steps.append((None, self._add_span(tensor), tensor.shape, tensor.dtype, tensor.device))

    def add_launch(self, run: Callable[[list[int], int], None], tensors: Sequence[torch.Tensor]) -> None:
        """Adds a launch of `run(addresses of tensors, stream)`."""
        self._steps.append((run, tuple([self._place(tensor.data_ptr()) for tensor in tensors])))

    def _place(self, address: int) -> tuple[int, int]:
        """The input or allocation that contains an address, and the offset; of several, the most recent one."""
        for slot in range(len(self._spans) - 1, -1, -1):
            start, end = self._spans[slot]
            if start <= address < end:
                return slot, address - start
        raise ValueError("A kernel got a tensor that is neither an input nor allocated while recording.")

    def finish(self, outputs: Outputs, extra: Any) -> None:
        """Ends the recording.

        Args:
            outputs: the allocations that are results.
            extra: a value that is the same for every replay.
        """
        self.extra = extra
        self._outputs = [None if tensor is None else self._place(tensor.data_ptr())[0] for tensor in outputs]
        last_use, allocated = {}, []
        for number, (run, what, *_) in enumerate(self._steps):
            if run is None:
                allocated.append(what)
                last_use[what] = number
            else:
                last_use.update(dict.fromkeys((slot for slot, _ in what), number))
        # as without a recording, memory is freed when its last launch is queued
        released: dict[int, list[int]] = {}
        for slot in allocated:
            if slot not in self._outputs:
                released.setdefault(last_use[slot], []).append(slot)
        self._steps = [
            step if step[0] is None else (*step, tuple(released.get(number, ())))
            for number, step in enumerate(self._steps)
        ]

    def replay(self, addresses: list[int]) -> Outputs:
        """Repeats the allocations and launches, and returns the outputs.

        Args:
            addresses: addresses of the inputs, in order; 0 for absent inputs.
        """
        num_slots = len(self._spans)
        tensors: Outputs = [None] * num_slots
        addresses = addresses + [0] * (num_slots - len(addresses))
        stream = torch.cuda.current_stream(self._device).cuda_stream if self._device.type == "cuda" else 0
        with self._lock:
            for run, *step in self._steps:
                if run is None:
                    slot, shape, dtype, device = step
                    tensors[slot] = tensor = torch.empty(shape, dtype=dtype, device=device)
                    addresses[slot] = tensor.data_ptr()
                else:
                    places, released = step
                    run([addresses[slot] + offset for slot, offset in places], stream)
                    for slot in released:
                        tensors[slot] = None
        return [None if slot is None else tensors[slot] for slot in self._outputs]


def active_recorder() -> LaunchRecorder | None:
    """The recorder of allocations and launches in this thread."""
    return getattr(_local, "recorder", None)


def recorded(
    key: Hashable, inputs: Sequence[torch.Tensor | None], run: Callable[[], tuple[Outputs, Any]]
) -> tuple[Outputs, Any]:
    """Result of `run()`, replayed if there is a recording for the key.

    Args:
        key: all values that allocations and launches depend on.
        inputs: all tensors that `run` passes to kernels. If one is not contiguous or not aligned, or two overlap,
            nothing is recorded.
        run: returns outputs, all allocated during the run, and a value that depends only on the key.
    """
    present = [tensor for tensor in inputs if tensor is not None]
    if not all(tensor.is_cuda and tensor.is_contiguous() for tensor in present):
        return run()
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in inputs]
    # binaries are compiled for aligned pointers; only some slices of tensors are unaligned
    if reduce(or_, addresses) % 16:
        return run()
    recorder = _recordings.get(key)
    if recorder is not None:
        return recorder.replay(addresses), recorder.extra
    recorder = LaunchRecorder(inputs)
    if recorder.has_overlapping_inputs():
        # addresses would be ambiguous
        return run()
    _local.recorder = recorder
    try:
        outputs, extra = run()
    finally:
        _local.recorder = None
    recorder.finish(outputs, extra)
    with _lock:
        if len(_recordings) >= MOST_RECORDINGS:
            _recordings.pop(next(iter(_recordings)))
        _recordings[key] = recorder
    return outputs, extra


def forget_recordings() -> None:
    """Drops all recordings, after a change that affects launches but not keys."""
    _recordings.clear()


def allocate(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Allocates an uninitialized tensor and records it if a recorder is active."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    recorder = active_recorder()
    if recorder is not None:
        recorder.add_allocation(tensor)
    return tensor
