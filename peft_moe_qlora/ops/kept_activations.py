"""Reuse of experts' activations when a checkpointed region is recomputed.

The fused layer saves the input of its gate and the rank-r activations. With selective checkpointing, recomputation
reuses them instead of running the grouped products again; the rest of the region is recomputed as usual. The backward
of the layer does not read its output, so recomputation skips the second product unless another backward reads it.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from typing import Any, Literal

_local = threading.local()

Unused = Literal["empty", "nan"]
"""Contents of an output that is not computed: uninitialized memory, or NaN to detect whether it is read."""


class _Region:
    """The calls of experts in one run of a region, in order."""

    def __init__(self) -> None:
        self.kept: list[Any] = []


class _Run(AbstractContextManager):
    """One run of a region, its forward or its recomputation; reusable, but not reentrant."""

    def __init__(self, region: _Region, is_recomputation: bool) -> None:
        self.region = region
        self.is_recomputation = is_recomputation

    def __enter__(self) -> None:
        self.outer, self.taken = getattr(_local, "run", None), 0
        if not self.is_recomputation:
            self.region.kept.clear()
        _local.run = self

    def __exit__(self, *exception: Any) -> None:
        if _local.run is self:  # not if it was left by `leave_regions`
            _local.run = self.outer


def leave_regions() -> None:
    """Leaves the regions in which this thread is.

    If a forward fails, torch 2.11 leaves its region only when the exception is freed, and later ones would be kept.
    """
    _local.run = None


def keep_experts() -> tuple[AbstractContextManager, AbstractContextManager]:
    """Returns the `context_fn` pair of selective checkpointing that saves the activations of experts.

    Pass it as `context_fn` of `torch.utils.checkpoint.checkpoint`; `prepare_model_for_training` does it for all layers
    of a model. Only the fused kernels save activations; other paths are recomputed.
    """
    region = _Region()
    return _Run(region, is_recomputation=False), _Run(region, is_recomputation=True)


def keep(what: Any) -> None:
    """Saves the results of a call if this thread runs the forward of a region."""
    run = getattr(_local, "run", None)
    if run is not None and not run.is_recomputation:
        run.region.kept.append(what)


def take_kept() -> Any | None:
    """Results that the same call saved in the forward, if this thread recomputes a region; else None."""
    run = getattr(_local, "run", None)
    if run is None or not run.is_recomputation or run.taken == len(run.region.kept):
        return None
    run.taken += 1
    return run.region.kept[run.taken - 1]


def kept_nbytes(num_tokens: int, top_k: int, hidden: int, up_features: int, rank: int) -> int:
    """Bytes that one experts module saves in 16 bits: output, input of the gate, rank-r rows, and the routing."""
    return num_tokens * (2 * hidden + top_k * (2 * up_features + 2 * 2 * rank + 2 * 4))


class without_output(AbstractContextManager):
    """Makes fused experts in this thread compute only what their backward needs, not their output.

    Args:
        unused: contents of the output instead.
    """

    def __init__(self, unused: Unused = "empty") -> None:
        self.unused = unused

    def __enter__(self) -> None:
        self.outer, _local.unused = getattr(_local, "unused", None), self.unused

    def __exit__(self, *exception: Any) -> None:
        _local.unused = self.outer


class with_backward(AbstractContextManager):
    """Makes fused experts in this thread compute as for a backward while autograd is off, as in a captured forward.

    Otherwise, few tokens would be computed by another kernel, with other rounding.
    """

    def __enter__(self) -> None:
        self.outer, _local.has_backward = has_backward(), True

    def __exit__(self, *exception: Any) -> None:
        _local.has_backward = self.outer


def has_backward() -> bool:
    """Whether this thread is in `with_backward`."""
    return getattr(_local, "has_backward", False)


def unused_output() -> Unused | None:
    """Contents of the uncomputed output of experts in this thread; None if the output is computed."""
    return getattr(_local, "unused", None)
