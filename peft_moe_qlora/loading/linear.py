"""Linear layers in 4 bits, which bitsandbytes stores and computes."""

from __future__ import annotations

import inspect
import re
from functools import cache

from bitsandbytes.nn import Linear4bit
from torch import nn


def asked_for_dtype(model: nn.Module) -> list[str]:
    """Paths of linear layers that must stay in 16 bits because the parent module casts inputs to `weight.dtype`.

    In 4 bits, that dtype is uint8, and the cast would truncate activations to integers.
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

    On such a CPU in evaluation mode, `Linear4bit.forward` repacks the codes and rounds the scales to bf16, for a
    faster product. PEFT's merge, `dequantize` and the backward would then misread the repacked bytes.

    Args:
        model: model whose `Linear4bit` layers are changed to compute from the stored bytes, which is slower.

    Raises:
        ValueError: a layer is already repacked; the model is then unchanged. bitsandbytes can't restore the layer,
            because the original scales are lost.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    for name, layer in layers.items():
        if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            raise ValueError(
                f"bitsandbytes has repacked {name}, a 4-bit linear layer, and rounded its scales when the model ran "
                "on this CPU in evaluation mode. Merging, saving and training would misread it. Load the model again, "
                "and call get_peft_model or quantize_experts before you run it."
            )
    for layer in layers.values():
        layer.support_avx512bf16_for_cpu = False
