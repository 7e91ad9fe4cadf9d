"""Stands in for CUDA's captures where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch


class CalledAgain:
    """What was captured on a CPU: a replay runs it once more."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.work = work

    def replay(self) -> None:
        self.work()


class CallingBackend:
    """Captures by calling: buffers, keys and fallbacks are those of CUDA's."""

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
    """Captures without calling, as CUDA does: what a step does to a cache happens when it is replayed."""

    def capture(self, work: Callable[[], None]) -> CalledAgain:
        self.captures += 1
        return CalledAgain(work)
