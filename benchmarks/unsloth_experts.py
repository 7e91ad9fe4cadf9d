"""Experts of unsloth_zoo in a transformers model: its packed stacks, and its forward, applied by its patches.

The import of unsloth_zoo requires all of Unsloth and a GPU. The benchmark needs only a few of its modules, and imports
them into empty packages with the same names.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

PACKAGE = "unsloth_zoo"
PATCHES = f"{PACKAGE}.temporary_patches"
PROJECTIONS = ("gate_up_proj", "down_proj")


def apply(model_type: str) -> None:
    """Applies unsloth_zoo's patches to classes of transformers and PEFT for the rest of the process.

    Raises:
        ImportError: unsloth_zoo is not installed.
        ValueError: the model is not Qwen3.
    """
    if model_type != "qwen3_moe":
        raise ValueError(f"The arm unsloth supports only Qwen3's experts, not {model_type}'s.")
    if PATCHES in sys.modules:
        return
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise ImportError("The arm unsloth requires unsloth_zoo, which is not installed. Run pip install unsloth_zoo.")
    folder = Path(next(iter(found.submodule_search_locations)))
    _add_empty_package(PACKAGE, folder)
    _add_empty_package(PATCHES, folder / "temporary_patches")
    importlib.import_module(f"{PATCHES}.moe_utils")
    four_bit = importlib.import_module(f"{PATCHES}.moe_utils_bnb4bit")
    importlib.import_module(f"{PATCHES}.qwen3_moe").patch_qwen3_moe()
    four_bit.patch_peft_param_wrapper_4bit_expert_shape()
    four_bit.patch_peft_param_wrapper_merge_4bit()


def _add_empty_package(name: str, folder: Path) -> None:
    module = ModuleType(name)
    module.__path__ = [str(folder)]
    module.__package__ = name
    module.__spec__ = ModuleSpec(name, None, is_package=True)
    module.__spec__.submodule_search_locations = [str(folder)]
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)


def packed(experts: nn.Module) -> nn.Module:
    """Replaces the stacks of experts by unsloth_zoo's NF4 stacks with 8-bit scales."""
    make = sys.modules[f"{PATCHES}.moe_utils_bnb4bit"]._make_expert_params4bit
    for name in PROJECTIONS:
        weights = getattr(experts, name).data
        options = {"compress_statistics": True, "quant_type": "nf4", "quant_storage": torch.uint8}
        stack = make(weights, requires_grad=False, **options).to(weights.device)
        stack._original_shape = weights.shape
        delattr(experts, name)
        setattr(experts, name, stack)
    return experts
