"""Linear layers in 4 bits: bitsandbytes stores and computes them."""

from __future__ import annotations

import inspect
import re
from functools import cache

from bitsandbytes.nn import Linear4bit
from torch import nn


def asked_for_dtype(model: nn.Module) -> list[str]:
    """Paths of linear layers that must stay in 16 bits, since their module casts their inputs to their dtype.

    In 4 bits that is uint8, which would truncate activations to integers.
    """
    found = []
    for path, module in model.named_modules():
        names = [name for name, child in module.named_children() if isinstance(child, nn.Linear)]
        asked = _asked_for_dtype(type(module)) if names else ()
        found += [f"{path}.{name}".lstrip(".") for name in names if name in asked]
    return found


@cache
def _asked_for_dtype(cls: type) -> frozenset[str]:
    try:
        source = inspect.getsource(cls)
    except (OSError, TypeError):  # a class without a source file
        return frozenset()
    return frozenset(re.findall(r"self\.(\w+)\.weight\.dtype", source))


def keep_linear_as_stored(model: nn.Module) -> None:
    """Stops bitsandbytes from repacking linear layers on a CPU with AVX512-BF16.

    There, `Linear4bit.forward` repacks codes and rounds scales to bf16 in evaluation mode, for a faster product.
    PEFT's merge, `dequantize` and the backward take the repacked bytes for the stored ones.

    Args:
        model: its `Linear4bit` layers are set to compute from what is stored, which is slower on such a CPU.

    Raises:
        ValueError: a layer is repacked already; the model is then unchanged. bitsandbytes can't undo it: the
            original scales are lost.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    for name, layer in layers.items():
        if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            raise ValueError(
                f"bitsandbytes has repacked {name}, a linear layer in 4 bits, and rounded its scales, when the model "
                "ran on this CPU in evaluation mode. Merging, saving and training would misread it. Load the model "
                "again, and call get_peft_model or quantize_experts before running it."
            )
    for layer in layers.values():
        layer.support_avx512bf16_for_cpu = False
