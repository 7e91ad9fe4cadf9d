"""Tensors with fixed addresses, for inputs and outputs of CUDA graphs."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor


class StaticTensors:
    """One buffer for each role, shape and dtype, shared by all graphs that run sequentially on a stream."""

    def __init__(self) -> None:
        self._buffers: dict[Hashable, Tensor] = {}
        self._loaded: dict[Hashable, tuple[weakref.ref[Tensor], int]] = {}

    def buffer(self, role: Hashable, like: Tensor) -> Tensor:
        """A contiguous buffer with the shape, dtype and device of a tensor; uninitialized at first."""
        key = (role, like.shape, like.dtype, like.device)
        if key not in self._buffers:
            with torch.inference_mode(False):  # inference tensors are read-only outside of inference mode
                self._buffers[key] = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        return self._buffers[key]

    @torch.no_grad()
    def load(self, role: Hashable, source: Tensor) -> Tensor:
        """The buffer of a role with the values of a tensor; copies them unless the buffer already contains them."""
        key = (role, source.shape, source.dtype, source.device)
        buffer = self.buffer(role, source)
        if source.is_inference():  # no version counter
            buffer.copy_(source)
            return buffer
        loaded, version = self._loaded.get(key, (None, 0))
        if loaded is None or loaded() is not source or version != source._version:
            _copy([buffer], [source])
            self.holds(role, source)
        return buffer

    def store(self, results: Sequence[tuple[Hashable, Tensor | None]]) -> list[Tensor | None]:
        """Copies results into the buffers of their roles; None stays None."""
        buffers = [None if result is None else self.buffer(role, result) for role, result in results]
        _copy([one for one in buffers if one is not None], [result for _, result in results if result is not None])
        return buffers

    def holds(self, role: Hashable, source: Tensor) -> None:
        """Marks the buffer of a role as containing the values of a tensor, so that `load` does not copy it."""
        self._loaded[role, source.shape, source.dtype, source.device] = (weakref.ref(source), source._version)

    def changed(self, *roles: Hashable) -> None:
        """Marks the buffers of roles as changed by a graph."""
        self._loaded = {key: loaded for key, loaded in self._loaded.items() if key[0] not in roles}


def copies(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Copies of buffers."""
    results = [None if tensor is None else torch.empty_like(tensor) for tensor in tensors]
    _copy([one for one in results if one is not None], [one for one in tensors if one is not None])
    return results


@torch.no_grad()
def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copies all tensors in few launches."""
    if targets:
        # through `data`: autograd must not count this as an in-place change of tensors that a captured backward reads;
        # their values are restored before it runs
        torch._foreach_copy_([target.data for target in targets], sources)
