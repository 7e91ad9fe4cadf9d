"""Parameters that an engine has sharded over processes, so that each process holds only a part of them."""

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
    FSDP2: "save_pretrained(directory, is_main_process=...) in all processes writes the whole adapter; then load it",
    ZERO3: (
        "stay inside `with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0)`. Or save the "
        "adapter, load it"
    ),
}


def sharded_by(parameter: torch.Tensor) -> str | None:
    """Which engine has spread a parameter, `FSDP2` or `ZERO3`; None where all of it is here, for now at least.

    Whatever makes DTensors goes by the name of FSDP2. DeepSpeed marks its parameters, and says of each whether it is
    gathered.
    """
    if isinstance(parameter, DTensor):
        return FSDP2
    status = getattr(parameter, "ds_status", None)
    return None if status is None or status.name == "AVAILABLE" else ZERO3


def whole_shape(parameter: torch.Tensor) -> torch.Size:
    """Of a parameter with what other processes have of it; ZeRO-3 leaves an empty one in its place."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def sharded_parameters(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Name and engine of each parameter of which this process has but a part."""
    for name, parameter in model.named_parameters():
        engine = sharded_by(parameter)
        if engine is not None:
            yield name, engine


def engine_of(module: nn.Module) -> str | None:
    """Which engine spreads parameters of a module, whether they are gathered now or not; None if none does."""
    # the mark is on modules inside of one that is sharded as a whole
    if any(isinstance(one, FSDPModule) or hasattr(one, "_is_fsdp_managed_module") for one in module.modules()):
        return FSDP2
    parameters = module.parameters()
    return next((sharded_by(one) or ZERO3 for one in parameters if sharded_by(one) or hasattr(one, "ds_id")), None)


def refuse_sharded(model: nn.Module, action: str, path: str = "") -> None:
    """Refuses what needs whole parameters.

    Args:
        model: or a part of one.
        action: what needs them, as in "merging".
        path: of the part, for the error.

    Raises:
        ValueError: names the first sharded parameter, the engine, and how to gather it.
    """
    name, engine = next(sharded_parameters(model), (None, None))
    if name is None and engine_of(model) == FSDP2:
        # after unshard() all is here, but FSDP2 throws away what is written to it
        name, engine = next(name for name, _ in model.named_parameters()), FSDP2
    if name is not None:
        raise ValueError(f"{path}{'.' if path else ''}{name} {gather_first(engine, action)}")


def gather_first(engine: str, action: str) -> str:
    """The end of an error, behind the name of a parameter."""
    return (
        f"is sharded over processes by {engine}, and {action} needs all of it. Gather first: {_GATHER[engine]} onto "
        "its base in one process, and do it there."
    )


def gathered(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same with the whole of each DTensor, on the CPU; every process has to call it.

    Args:
        tensors: by name, in the same order in all processes.
    """
    return {
        name: tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor for name, tensor in tensors.items()
    }


def refuse_parts(
    parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, torch.Tensor], needed: Collection[str]
) -> None:
    """Refuses to save less than there is.

    By the first process only: the others write nothing, and may have been given nothing.

    Args:
        parameters: of a model, by name.
        tensors: to be saved, of the same names.
        needed: names that have to be among them.

    Raises:
        ValueError: a tensor is what ZeRO-3 has left here of a parameter, or is missing.
    """
    if distributed.is_available() and distributed.is_initialized() and distributed.get_rank() > 0:
        return
    for name, parameter in parameters.items():
        tensor = tensors.get(name)
        if tensor is None and name in needed:
            raise ValueError(
                f"The tensors to be saved lack {name}. Pass all of the model's as state_dict, or none. If DeepSpeed's "
                "ZeRO-3 is in use, set zero3_save_16bit_model (stage3_gather_16bit_weights_on_model_save)."
            )
        if tensor is not None and sharded_by(parameter) == ZERO3 and tensor.shape != whole_shape(parameter):
            raise ValueError(
                f"{name} is sharded over processes by {ZERO3}, which has left {tuple(tensor.shape)} of "
                f"{tuple(whole_shape(parameter))} here. Save as a Trainer does, with "
                "`save_pretrained(directory, is_main_process=accelerator.is_main_process, "
                "state_dict=accelerator.get_state_dict(engine))` in all processes."
            )


def refuse_fsdp1() -> None:
    """Refuses packed weights where accelerate is set up to shard models by FSDP1.

    Raises:
        ValueError: it is.
    """
    state = AcceleratorState() if is_initialized() else None
    if state is None or state.distributed_type != DistributedType.FSDP or state.fsdp_plugin.fsdp_version != 1:
        return
    raise ValueError(
        "accelerate is set up for FSDP1 (fsdp_version: 1), which makes all parameters of a layer one of a floating "
        "dtype; packed weights are integers. Set fsdp_version: 2, or use DDP or DeepSpeed."
    )
