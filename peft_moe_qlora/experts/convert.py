"""Turning a model's experts modules into `QuantizedExperts`, stack by stack, in place."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from tqdm.auto import tqdm

from ..quantization import QUANTIZABLE_DTYPES, DenseStack, FourBitFormat, QuantizedStack, Stack
from .layout import (
    check_floating_point,
    declares_layout,
    named_modules_with_shared,
    read_layout,
    refuse_unsupported,
)
from .quantized import QuantizedExperts


def find_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`(path, module)` of every routed experts module, in 16 bits or already converted."""
    for path, module in named_modules_with_shared(model):
        # a root has no parent in which it could be replaced
        if path and (isinstance(module, QuantizedExperts) or declares_layout(module)):
            yield path, module


def check_convertible(model: nn.Module, storage: FourBitFormat | None) -> list[str]:
    """Makes sure that `convert_experts` will work, before anything is changed; returns the paths it would change.

    Raises:
        ValueError: there are no routed experts, or a module has an unsupported class, an unexpected layout, dtype or
            device, or is already stored otherwise. The error names it.
    """
    refuse_unsupported(model)
    paths = []
    found = False
    for path, module in find_experts(model):
        found = True
        if isinstance(module, QuantizedExperts):
            _check_storage(path, module, storage)
            continue
        read_layout(module, path)
        check_floating_point(module, path, QUANTIZABLE_DTYPES)
        paths.append(path)
    if not found:
        raise ValueError(
            f"No routed experts found in {type(model).__name__}: no module declares the fused 3-D stacks of "
            "transformers' @use_experts_implementation. For dense models, and for experts stored otherwise, use PEFT's "
            "LoraConfig on the linear layers."
        )
    return paths


def _check_storage(path: str, experts: QuantizedExperts, storage: FourBitFormat | None) -> None:
    for projection in experts.layout.projections:
        found = experts.stack(projection).storage
        if found != storage:
            raise ValueError(
                f"{path}.{projection} is already stored as {found or 'unquantized'}, but {storage or 'unquantized'} "
                "was asked for. Ask for the same quant_type, blocksize and double_quant, or load the model again."
            )


@torch.no_grad()
def convert_experts(model: nn.Module, storage: FourBitFormat | None, progressbar: bool = False) -> None:
    """Replaces every 16-bit experts module by a `QuantizedExperts` that stores its stacks in `storage`.

    Stack by stack: a 16-bit stack is freed before the next is quantized. Experts already converted stay as they are;
    modules and parameters that are shared stay shared.

    Args:
        model: changed in place.
        storage: the 4-bit format; None keeps the stacks as they are.
        progressbar: show one.

    Raises:
        ValueError: see `check_convertible`; the model is then unchanged.
    """
    paths = check_convertible(model, storage)
    converted: dict[int, QuantizedExperts] = {}
    stacks: dict[int, Stack] = {}
    kept = []  # parameters whose id is a key of `stacks` must not be freed before all places that share them are done
    num_uses = _count_uses(model, paths)
    for path in tqdm(paths, desc="Quantizing experts", unit="module", disable=not progressbar or storage is None):
        parent_path, _, name = path.rpartition(".")
        module = model.get_submodule(path)
        if isinstance(module, QuantizedExperts):  # a parent that is shared brought it here
            continue
        if id(module) not in converted:
            layout = read_layout(module, path)
            own_stacks = {}
            for projection in layout.projections:
                parameter = module._parameters.pop(projection)
                key = id(parameter)
                if key not in stacks:
                    stack = _store(parameter, layout.is_transposed, storage)
                    if num_uses[key] > 1:
                        stacks[key] = stack
                        kept.append(parameter)
                else:
                    stack = stacks[key]
                own_stacks[projection] = stack
                del parameter
            converted[id(module)] = QuantizedExperts(module, layout, own_stacks)
            _move_hook(module, converted[id(module)])
        setattr(model.get_submodule(parent_path), name, converted[id(module)])


def _count_uses(model: nn.Module, paths: list[str]) -> dict[int, int]:
    uses: dict[int, int] = {}
    for module in {id(module): module for module in map(model.get_submodule, paths)}.values():
        for parameter in module._parameters.values():
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    return uses


def _store(parameter: nn.Parameter, is_transposed: bool, storage: FourBitFormat | None) -> Stack:
    if storage is None:
        return DenseStack(parameter, is_transposed)
    return QuantizedStack.from_dense(parameter, is_transposed, storage)


def _move_hook(old: nn.Module, new: nn.Module) -> None:
    """Lets accelerate's hook (which brings inputs to the module's device) act on the replacement."""
    hook = getattr(old, "_hf_hook", None)
    if hook is not None:
        from accelerate.hooks import add_hook_to_module, remove_hook_from_module

        remove_hook_from_module(old)
        add_hook_to_module(new, hook)


def revert_experts(model: nn.Module, dtype: torch.dtype) -> None:
    """Puts the classes' own modules back, with dequantized stacks in `dtype`."""
    restored: dict[int, nn.Module] = {}
    for path, module in list(named_modules_with_shared(model)):
        if isinstance(module, QuantizedExperts):
            if id(module) not in restored:
                restored[id(module)] = module.restore(
                    {name: dense(module.stack(name), dtype) for name in module.layout.projections}
                )
                _move_hook(module, restored[id(module)])
            parent_path, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent_path), name, restored[id(module)])


def dense(stack: Stack, dtype: torch.dtype) -> DenseStack:
    """The stack in floating point, rounded once."""
    return DenseStack(stack.decode(dtype), stack.is_transposed)
