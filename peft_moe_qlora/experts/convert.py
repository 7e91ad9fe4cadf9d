"""Converts the experts modules of a model to `QuantizedExperts`, in place and stack by stack."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from torch import nn
from tqdm.auto import tqdm

from ..progress import PATIENCE
from ..quantization import QUANTIZABLE_DTYPES, DenseStack, Format, QuantizedStack, Stack
from .layout import (
    SHARD_LATER,
    check_floating_point,
    check_not_sharded,
    declares_layout,
    read_layout,
    refuse_unsupported,
)
from .quantized import QuantizedExperts


def find_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`(path, module)` of every routed experts module, in 16 bits or already converted."""
    for path, module in model.named_modules(remove_duplicate=False):
        # the root has no parent in which it could be replaced
        if path and (isinstance(module, QuantizedExperts) or declares_layout(module)):
            yield path, module


def check_convertible(model: nn.Module, storage: Format | None) -> list[str]:
    """Checks that `convert_experts` will succeed; returns the paths that it would convert.

    Raises:
        ValueError: there are no routed experts, or a module has an unsupported class, an unexpected layout, dtype or
            device, is sharded, or is already stored in another format. The error names the module.
    """
    refuse_unsupported(model)
    if getattr(getattr(model, "config", None), "distributed_config", None) is not None:
        # the plan distributes features, experts or layers to other processes
        raise ValueError(f"{type(model).__name__} was loaded with a distributed_config; {SHARD_LATER}")
    paths = []
    found = False
    is_mixed = stored_format(model) is not None
    for path, module in find_experts(model):
        found = True
        check_not_sharded(module, path)
        if isinstance(module, QuantizedExperts):
            _check_storage(path, module, storage, is_mixed)
            continue
        read_layout(module, path)
        check_floating_point(module, path, QUANTIZABLE_DTYPES)
        paths.append(path)
    if not found:
        raise ValueError(
            f"No routed experts found in {type(model).__name__}: no module declares the fused 3-D stacks of "
            "transformers' @use_experts_implementation. For dense models and experts in another form, use PEFT's "
            "LoraConfig on the linear layers."
        )
    return paths


def stored_format(model: nn.Module) -> Format | None:
    """The format of the experts of a model, which is the same for all; None if none are packed."""
    stacks = (module for module in model.modules() if isinstance(module, Stack))
    return next((stack.storage for stack in stacks if stack.storage is not None), None)


def _check_storage(path: str, experts: QuantizedExperts, storage: Format | None, is_mixed: bool) -> None:
    for projection in experts.layout.projections:
        found = experts.stack(projection).storage
        if found is None and is_mixed:  # left in 16 bits by the checkpoint or skip_modules
            continue
        if found != storage:
            raise ValueError(
                f"{path}.{projection} is already stored as {found or 'unquantized'}, but {storage or 'unquantized'} "
                "was requested. Request the same storage (quant_type, blocksize and double_quant for 4 bits), or load "
                "the model again."
            )


@torch.no_grad()
def convert_experts(model: nn.Module, storage: Format | None, progressbar: bool = False) -> None:
    """Replaces every 16-bit experts module by a `QuantizedExperts` that stores its stacks in `storage`.

    Each 16-bit stack is freed before the next is quantized. Experts that are already converted are not changed. Shared
    modules and parameters stay shared.

    Args:
        model: changed in place.
        storage: the format; None keeps the stacks as they are.
        progressbar: show a progress bar.

    Raises:
        ValueError: see `check_convertible`; the model is then unchanged.
    """
    paths = check_convertible(model, storage)
    converted: dict[nn.Module, QuantizedExperts] = {}
    tied = _tied_stacks(model, paths)
    hidden = not progressbar or storage is None or not paths
    for path in tqdm(paths, desc="Quantizing experts", unit="module", disable=hidden):
        parent_path, _, name = path.rpartition(".")
        module = model.get_submodule(path)
        if isinstance(module, QuantizedExperts):  # already replaced through a shared parent
            continue
        if module not in converted:
            converted[module] = _convert(module, path, storage, tied)
            move_hook(module, converted[module])
        setattr(model.get_submodule(parent_path), name, converted[module])


def _tied_stacks(model: nn.Module, paths: list[str]) -> dict[int, Stack | None]:
    """Ids of the parameters shared by several modules, to be mapped to the stack that replaces them."""
    modules = {model.get_submodule(path) for path in paths}
    uses = Counter(id(parameter) for module in modules for parameter in module._parameters.values())
    return {key: None for key, count in uses.items() if count > 1}


def _convert(module: nn.Module, path: str, storage: Format | None, tied: dict[int, Stack | None]) -> QuantizedExperts:
    """Moves the parameters of one experts module into stacks; frees each before it converts the next."""
    layout = read_layout(module, path)
    stacks = {}
    for projection in layout.projections:
        parameter = module._parameters[projection]
        stack = tied.get(id(parameter))
        if stack is None and storage is None:
            stack = DenseStack(parameter, layout.is_transposed)
        elif stack is None:
            try:
                stack = QuantizedStack.from_dense(parameter, layout.is_transposed, storage, layout.parts(projection))
            except ValueError as error:
                raise ValueError(f"{path}.{projection} cannot be quantized: {error}") from error
        if id(parameter) in tied:
            tied[id(parameter)] = stack
            stack = stack.alias()  # a separate module, which an adapter can wrap
        stacks[projection] = stack
        del module._parameters[projection], parameter
    return QuantizedExperts(module, layout, stacks)


def move_hook(old: nn.Module, new: nn.Module) -> None:
    """Moves accelerate's hook, which moves inputs to the module's device, to the replacement."""
    hook = getattr(old, "_hf_hook", None)
    if hook is not None:
        from accelerate.hooks import add_hook_to_module, remove_hook_from_module

        remove_hook_from_module(old)
        add_hook_to_module(new, hook)


def revert_experts(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Restores the original experts modules, with dequantized stacks in `dtype`, by default their original dtype."""
    restored: dict[nn.Module, nn.Module] = {}
    modules = list(model.named_modules(remove_duplicate=False))
    found = [(path, module) for path, module in modules if isinstance(module, QuantizedExperts)]
    for path, module in tqdm(found, desc="Dequantizing experts", unit="module", delay=PATIENCE):
        if module not in restored:
            restored[module] = module.restore(dtype)
            move_hook(module, restored[module])
        parent_path, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent_path), name, restored[module])
