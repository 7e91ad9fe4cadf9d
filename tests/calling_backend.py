"""Replaces CUDA graph captures on machines without a GPU: by plain calls, or by operators that are called again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class CalledAgain:
    """A "capture" on a CPU: a replay calls the function again."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.work = work

    def replay(self) -> None:
        self.work()


class CallingBackend:
    """Captures by calling the function. Buffers, keys and fallbacks are those of the CUDA backend."""

    device_type = "cpu"

    def __init__(self, device: torch.device) -> None:
        self.captures = 0

    def warm_up(self, work: Callable[[], None]) -> None:
        work()

    def capture(self, work: Callable[[], None]) -> CalledAgain:
        self.captures += 1
        work()
        return CalledAgain(work)

    def why_no_room(self) -> str | None:
        return None


class LateBackend(CallingBackend):
    """Captures without calling the function, like CUDA: changes to a cache happen at the replay."""

    def capture(self, work: Callable[[], None]) -> CalledAgain:
        self.captures += 1
        return CalledAgain(work)


class _Operators(TorchDispatchMode):
    """Records the calls of operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result


class RecordedOperators:
    """A "capture" on a CPU of the operators that a function called; a replay ignores all changes since then."""

    def __init__(self, calls: list[tuple]) -> None:
        self.calls = calls

    @torch.no_grad()
    def replay(self) -> None:
        for function, args, kwargs, result in self.calls:
            schema = function._schema
            if schema.is_mutable:
                function(*args, **kwargs)
            elif not any(value.alias_info for value in schema.returns):  # views are of memory that is replayed
                again = function(*args, **kwargs)
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor):
                        old.data.copy_(new)


class RecordingBackend(CallingBackend):
    """Captures operators, like CUDA, for layers that do not copy to the host."""

    def capture(self, work: Callable[[], None]) -> RecordedOperators:
        self.captures += 1
        with _Operators() as operators:
            work()
        return RecordedOperators(operators.calls)
