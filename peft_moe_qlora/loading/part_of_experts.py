"""Which experts a process reads, where several share a model by FSDP2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Part:
    """The share of a process.

    Args:
        rank: of the process, from 0.
        world_size: number of processes that share the model.
        device: on which experts are quantized; None for where they are put.
    """

    rank: int
    world_size: int
    device: torch.device | None = None

    def experts(self, num_experts: int) -> range:
        """The experts that `Shard(0)` assigns to this process, split as by `torch.chunk`."""
        size = -(-num_experts // self.world_size)
        return range(min(self.rank * size, num_experts), min((self.rank + 1) * size, num_experts))


_PART: ContextVar[Part | None] = ContextVar("part of the experts", default=None)


@contextmanager
def read_part_of_experts(rank: int, world_size: int, device: torch.device | str | None = None) -> Iterator[None]:
    """Context manager: models loaded inside read only the experts that this process keeps under FSDP2.

    Load with `device_map="cpu"`: the memory of experts that are not read is never touched. Then add the adapter and
    shard the model with `fully_shard` and its default placement, or with accelerate and
    `fsdp_cpu_ram_efficient_loading: false`. Until it is sharded, the model can't be called.

    Checkpoints saved by this package are read in full.

    Args:
        rank: of this process among those that share the model.
        world_size: their number.
        device: on which experts are quantized, such as `"cuda"`. Default: the CPU.

    Raises:
        ValueError: the rank is not one of so many.
    """
    if not 0 <= rank < world_size:
        raise ValueError(
            f"rank={rank} was given for {world_size} processes; one from 0 to {world_size - 1} was expected."
        )
    token = _PART.set(Part(rank, world_size, None if device is None else torch.device(device)))
    try:
        yield
    finally:
        _PART.reset(token)


def current_part() -> Part | None:
    """The part to read in the current context; None for all experts."""
    return _PART.get()
