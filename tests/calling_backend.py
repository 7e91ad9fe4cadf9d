"""Replaces CUDA graph captures by plain calls on machines without a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch


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
