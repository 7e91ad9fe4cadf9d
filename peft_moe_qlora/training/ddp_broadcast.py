"""Skips DDP's broadcast of packed weights that are equal in all processes."""

from __future__ import annotations

import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

_CHUNK = 2**24
"""Number of bytes that are summed at a time; as int64 they take eight times the memory."""


@torch.no_grad()
def skip_broadcast(model: nn.Module, process_group: dist.ProcessGroup | None = None) -> int:
    """Excludes packed weights that are equal in all processes from the broadcast of `DistributedDataParallel(model)`.

    When DDP is created, it broadcasts all parameters of the first process, including frozen ones. Packed weights are
    integers and never trained. Their checksums are compared; weights that differ are broadcast as usual, with a
    warning. Call this function in all processes after the process group is created (`TrainingArguments` creates it),
    on the model that DDP or Trainer will wrap, with all adapters.

    Args:
        model: the model, not yet wrapped.
        process_group: process group of DDP. Default: all processes.

    Returns:
        Number of bytes that are not sent.

    Raises:
        RuntimeError: there is no process group.
    """
    if not dist.is_initialized():
        raise RuntimeError(
            "torch.distributed has no process group, which is required to compare weights between processes. Create "
            "TrainingArguments first, or call torch.distributed.init_process_group."
        )
    integers = {name: tensor for name, tensor in model.named_parameters() if not tensor.is_floating_point()}
    found = {name: _digest(tensor) for name, tensor in integers.items()}
    of_all: list[dict[str, tuple] | None] = [None] * dist.get_world_size(process_group)
    dist.all_gather_object(of_all, found, group=process_group)
    equal = [name for name in integers if all(one.get(name) == found[name] for one in of_all)]
    different = [name for name in integers if name not in equal]
    if different:
        warnings.warn(
            f"{len(different)} packed weights, such as {different[0]}, differ between processes and are broadcast. "
            "Load the same checkpoint on the same kind of device in all processes.",
            RuntimeWarning,
            stacklevel=2,
        )
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, equal)
    return sum(integers[name].nbytes for name in equal)


def _digest(tensor: torch.Tensor) -> tuple:
    """Dtype, shape, sum, and sum weighted by position, which detects moved values."""
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    plain = weighted = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, len(flat), _CHUNK):
        part = flat[start : start + _CHUNK].long()
        places = torch.arange(start + 1, start + 1 + len(part), device=part.device)
        plain, weighted = plain + part.sum(), weighted + (part * places).sum()
    return str(tensor.dtype), tuple(tensor.shape), int(plain), int(weighted)
