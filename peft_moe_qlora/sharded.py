"""Detects and gathers parameters that FSDP2 or ZeRO-3 has sharded over processes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import DistributedType
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

FSDP2, ZERO3 = "FSDP2", "ZeRO-3"

_GATHER = {
    FSDP2: "Save the adapter with save_pretrained(directory, is_main_process=...) in all processes, and load it",
    ZERO3: (
        "Use `with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0)`. Or save the "
        "adapter, load it"
    ),
}


def sharded_by(parameter: torch.Tensor) -> str | None:
    """The engine that has sharded a parameter, `FSDP2` or `ZERO3`; None if the parameter is currently whole.

    All DTensors count as FSDP2. DeepSpeed marks its parameters with attributes that include their status.
    """
    if isinstance(parameter, DTensor):
        return FSDP2
    status = getattr(parameter, "ds_status", None)
    return None if status is None or status.name == "AVAILABLE" else ZERO3


def whole_shape(parameter: torch.Tensor) -> torch.Size:
    """Shape of the unsharded parameter; ZeRO-3 replaces parameters by empty tensors."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def sharded_parameters(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Name and engine of each parameter of which this process has only a shard."""
    for name, parameter in model.named_parameters():
        engine = sharded_by(parameter)
        if engine is not None:
            yield name, engine


def engine_of(module: nn.Module) -> str | None:
    """The engine that shards parameters of a module, even if they are currently gathered; None if there is none."""
    # FSDP2 marks the modules inside of the one that it shards
    if any(isinstance(one, FSDPModule) or hasattr(one, "_is_fsdp_managed_module") for one in module.modules()):
        return FSDP2
    parameters = module.parameters()
    return next((sharded_by(one) or ZERO3 for one in parameters if sharded_by(one) or hasattr(one, "ds_id")), None)


def refuse_sharded(model: nn.Module, action: str, path: str = "") -> None:
    """Rejects sharded parameters for an action that requires whole ones.

    Args:
        model: the model or one of its modules.
        action: the action, such as "merging", for the error.
        path: path of the module, for the error.

    Raises:
        ValueError: a parameter is sharded; the error names it, the engine, and how to gather it.
    """
    name, engine = next(sharded_parameters(model), (None, None))
    if name is None and engine_of(model) == FSDP2:
        # after unshard() the parameters are whole, but FSDP2 discards changes to them
        name, engine = next(name for name, _ in model.named_parameters()), FSDP2
    if name is not None:
        raise ValueError(f"{path}{'.' if path else ''}{name} {gather_first(engine, action)}")


def gather_first(engine: str, action: str) -> str:
    """The error text that follows the name of a parameter."""
    return (
        f"is sharded over processes by {engine}, but {action} requires the whole tensor. {_GATHER[engine]} into its "
        "base model in one process, and do it there."
    )


def gathered(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Replaces each DTensor by the whole tensor on the CPU; all processes must call it.

    Args:
        tensors: tensors by name, in the same order in all processes.
    """
    return {
        name: tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor for name, tensor in tensors.items()
    }


def refuse_parts(
    parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, torch.Tensor], needed: Collection[str]
) -> None:
    """Rejects an incomplete state dict before it is saved.

    Checks only in the first process: the others write nothing, and may get an empty state dict.

    Args:
        parameters: parameters of the model by name.
        tensors: tensors to be saved, by the same names.
        needed: names that must be in `tensors`.

    Raises:
        ValueError: a tensor is missing or is a shard of ZeRO-3.
    """
    if distributed.is_available() and distributed.is_initialized() and distributed.get_rank() > 0:
        return
    for name, parameter in parameters.items():
        tensor = tensors.get(name)
        if tensor is None and name in needed:
            raise ValueError(
                f"The tensors to be saved do not contain {name}. Pass the model's whole state_dict, or none. With "
                "DeepSpeed ZeRO-3, set zero3_save_16bit_model (stage3_gather_16bit_weights_on_model_save)."
            )
        if tensor is not None and sharded_by(parameter) == ZERO3 and tensor.shape != whole_shape(parameter):
            raise ValueError(
                f"{name} is sharded over processes by {ZERO3}. Expected the whole tensor "
                f"{tuple(whole_shape(parameter))}, found {tuple(tensor.shape)}. Call `save_pretrained(directory, "
                "is_main_process=accelerator.is_main_process, state_dict=accelerator.get_state_dict(engine))` in all "
                "processes, as Trainer does."
            )


def refuse_fsdp1() -> None:
    """Rejects packed weights if accelerate is configured for FSDP1.

    Raises:
        ValueError: accelerate is configured for FSDP1.
    """
    state = AcceleratorState() if is_initialized() else None
    if state is None or state.distributed_type != DistributedType.FSDP or state.fsdp_plugin.fsdp_version != 1:
        return
    raise ValueError(
        "accelerate is configured for FSDP1 (fsdp_version: 1), which flattens the parameters of a layer into one "
        "floating-point parameter. Packed weights are integers. Set fsdp_version: 2, or use DDP or DeepSpeed."
    )
