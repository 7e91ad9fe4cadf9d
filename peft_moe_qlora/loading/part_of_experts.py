"""The experts that a process reads if several processes shard a model with FSDP2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Part:
    """The shard of a process.

    Args:
        rank: rank of the process.
        world_size: number of processes that shard the model.
        device: device on which experts are quantized; None for the device of their stack.
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
    `fsdp_cpu_ram_efficient_loading: false`. The model can't be called before it is sharded.

    Checkpoints saved by this package load as usual: they are memory-mapped, and sharding reads what a process keeps.

    Args:
        rank: rank of this process.
        world_size: number of processes that shard the model.
        device: device on which experts are quantized, such as `"cuda"`. Default: the CPU.

    Raises:
        ValueError: `rank` is not in the range of `world_size`.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank} is out of range for world_size={world_size}. Expected 0 <= rank < world_size.")
    token = _PART.set(Part(rank, world_size, None if device is None else torch.device(device)))
    try:
        yield
    finally:
        _PART.reset(token)


def current_part() -> Part | None:
    """The part set by the current context; None for all experts."""
    return _PART.get()
