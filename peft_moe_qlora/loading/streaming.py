"""Creates quantized experts on the meta device, and fills them from a checkpoint one expert at a time."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from bitsandbytes.nn import Params4bit
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..experts import QuantizedExperts, find_experts, read_layout
from ..quantization import QUANTIZABLE_DTYPES, Format, Stack
from .checkpoint import Checkpoint
from .part_of_experts import current_part
from .sources import NativeSource, Source, Sources


def attach_empty_experts(
    model: nn.Module,
    sources: Sources,
    storage_of: Callable[[Source], Format | None],
    checkpoint: Checkpoint,
    dtype: torch.dtype | None = None,
) -> None:
    """Replaces the experts modules of a model on the meta device by `QuantizedExperts` with empty stacks.

    If an error is raised, the model is unchanged.

    Args:
        model: changed in place.
        sources: path -> projection -> source of the stack.
        storage_of: returns the storage format of a source that is not quantized by another tool; None for `dtype`.
        checkpoint: the checkpoint.
        dtype: dtype of the weights before quantization. Default: the dtype of the model's parameters.

    Raises:
        CheckpointError: a stack saved by this package has another shape or storage in the checkpoint.
        ValueError: the dtype is not supported for experts.
    """
    tied = getattr(model, "all_tied_weights_keys", {})
    stacks: dict[str, Stack] = {}
    for path, of_module in sources.items():
        for projection, source in of_module.items():
            of_weights = dtype or source.target.dtype
            if of_weights not in QUANTIZABLE_DTYPES:
                raise ValueError(
                    f"{source.target.name}: loading experts as {of_weights} is not supported. Pass "
                    "dtype=torch.bfloat16, torch.float16 or torch.float32."
                )
            stack = source.empty_stack(storage_of(source), of_weights)
            if isinstance(source, NativeSource):
                source.check(stack, checkpoint)
            stacks[f"{path}.{projection}"] = stack
    replaced: dict[nn.Module, QuantizedExperts] = {}
    for path, module in list(find_experts(model)):
        parent_path, _, name = path.rpartition(".")
        parent = model.get_submodule(parent_path)
        if isinstance(getattr(parent, name), QuantizedExperts):  # replaced already through a shared parent
            continue
        if module not in replaced:
            layout = read_layout(module, path)
            of_module = {}
            for projection in layout.projections:
                key = f"{path}.{projection}"
                if key in tied:
                    sources[tied[key].rpartition(".")[0]][projection].is_shared = True
                # a separate module, so that an adapter can wrap it
                of_module[projection] = stacks[tied.pop(key)].alias() if key in tied else stacks[key]
                del module._parameters[projection]
            replaced[module] = _without_initialization(QuantizedExperts(module, layout, of_module))
        setattr(parent, name, replaced[module])


def _without_initialization(experts: QuantizedExperts) -> QuantizedExperts:
    """Marks the module, its stacks and its original module as initialized for transformers."""
    stacks = [experts.stack(projection) for projection in experts.layout.projections]
    for module in (experts, experts.original, *stacks):
        module._is_hf_initialized = True
    return experts


def in_order_of_reading(sources: Sources, checkpoint: Checkpoint) -> list[tuple[str, str]]:
    """`(path, projection)` of the stacks to fill, in their order on disk."""
    first = {
        (path, projection): min(checkpoint.position(key) for key in source.keys)
        for path, of_module in sources.items()
        for projection, source in of_module.items()
        if not isinstance(source, NativeSource) or source.is_shared
    }
    return sorted(first, key=first.__getitem__)


def fill_experts(model: nn.Module, sources: Sources, checkpoint: Checkpoint, progressbar: bool = True) -> None:
    """Reads, quantizes and stores all experts, on the devices of their stacks.

    Under `read_part_of_experts`, only the experts of this process are read. At most one expert is in 16 bits at a
    time. Values are cast to the model's dtype before quantization, as if the model had been loaded in it.

    Args:
        model: model after `attach_empty_experts`, with stacks that are not on the meta device.
        sources: path -> projection -> source of the stack.
        checkpoint: the checkpoint.
        progressbar: whether to show a progress bar.

    Raises:
        CheckpointError: a weight is not finite.
    """
    order = in_order_of_reading(sources, checkpoint)
    for path, projection in tqdm(order, desc="Quantizing experts", unit="stack", disable=not progressbar or not order):
        sources[path][projection].fill(model.get_submodule(path).stack(projection), checkpoint, current_part())


def planned_dtypes(model: PreTrainedModel) -> dict[str, torch.dtype]:
    """Name -> dtype with which transformers will load the floating-point parameters of a model on the meta device."""
    found = {name: tensor.dtype for name, tensor in model.named_parameters() if tensor.is_floating_point()}
    for pattern, dtype in model._get_dtype_plan(model.dtype).items():
        pattern = re.compile(pattern.replace("*", ".*"))
        found |= {name: dtype for name in found if pattern.search(name)}
    return found


def cast_as_planned(model: nn.Module, planned: dict[str, torch.dtype]) -> None:
    """Casts parameters that were loaded in the checkpoint's dtype.

    Some versions of transformers (5.17) don't cast tensors of quantized checkpoints that are renamed when loaded.
    """
    for name, tensor in model.named_parameters():
        if name in planned and tensor.is_floating_point() and not isinstance(tensor, Params4bit):
            tensor.data = tensor.data.to(planned[name])
