"""LoRA on a linear layer whose weight is stored in a `Format`."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from .config import MoeQLoraConfig
from .experts import move_hook
from .linear_lora import Base, FastForward, is_plain
from .ops import StoredMatrix, linear_dtype
from .quantized_linear import QuantizedLinear


class QuantizedLinearLora(FastForward, Linear):
    """PEFT's `lora.Linear` on a `QuantizedLinear`.

    Factors and their keys are PEFT's. Merging is overridden, since PEFT's writes to a floating-point weight.

    Args:
        base_layer: the layer.
        adapter_name: name of the first adapter.
        config: configuration of the adapter.
        kwargs: other arguments that PEFT passes to all layers.
    """

    def __init__(self, base_layer: QuantizedLinear, adapter_name: str, config: MoeQLoraConfig, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, config, **kwargs)
        self._unmerged: list[QuantizedLinear] = []  # at most one; a list, since a module would be registered

    def base(self, x: torch.Tensor) -> Base | None:
        layer = self.base_layer
        if not is_plain(layer, _QUANTIZED_LINEAR) or layer.device.type == "meta":
            return None
        dtype = linear_dtype(x)
        return Base(_matrix_of(layer), partial(_matrix_of, layer), dtype, dtype)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merges adapters into the layer, in its format. The unmerged layer is kept for `unmerge`.

        Args:
            safe_merge: ignored; weights that are not finite are always rejected, since codes cannot represent them.
            adapter_names: adapters to merge. Default: the active adapters that are not merged yet.

        Raises:
            ValueError: a merged weight is not finite; the layer is then unchanged.
        """
        adapter_names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not adapter_names:
            return
        names = [*self.merged_adapters, *adapter_names]
        # start from the unmerged layer: requantizing a merged one would round twice
        unmerged = self.unmerged_layer()
        self._put(unmerged.merged(self._delta(names)))
        self._unmerged = [unmerged]
        self.merged_adapters = names

    @torch.no_grad()
    def merged_dense(self, dtype: torch.dtype, adapter_names: Iterable[str]) -> nn.Linear:
        """Returns a new `nn.Linear`: decoded weights plus delta in fp32, rounded once to `dtype`.

        Raises:
            ValueError: a rounded weight is not finite.
        """
        names = dict.fromkeys([*self.merged_adapters, *adapter_names])
        layer = self.unmerged_layer().merged_dense(self._delta(names), dtype)
        move_hook(self.base_layer, layer)
        return layer

    def unmerge(self) -> None:
        """Restores the unmerged layer bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._put(self.unmerged_layer())
        self._unmerged, self.merged_adapters = [], []

    def unmerged_layer(self) -> QuantizedLinear:
        """The layer without any adapter."""
        current = self.base_layer
        if not self._unmerged:
            return current
        # the model may have been moved or cast after the merge, and the bias trained or loaded
        unmerged = self._unmerged[0].to(current.device, current.dtype)
        unmerged.bias = current.bias
        return unmerged

    def _put(self, layer: QuantizedLinear) -> None:
        move_hook(self.base_layer, layer)
        self.base_layer = layer

    def _delta(self, adapter_names: Iterable[str]) -> torch.Tensor:
        """Delta of the adapters, `(out, in)` in fp32; PEFT's `get_delta_weight` rounds to the dtype of the factors."""
        device = self.base_layer.device
        delta = torch.zeros(self.out_features, self.in_features, dtype=torch.float32, device=device)
        for name in adapter_names:
            if name in self.lora_A:
                A, B = (
                    factor[name].weight.detach().to(device, torch.float32) for factor in (self.lora_A, self.lora_B)
                )
                delta += self.scaling[name] * (B @ A)
        return delta

    # like those of PEFT, but without decoding the weight

    def _get_in_out_features(self, module: QuantizedLinear) -> tuple[int, int]:
        return module.in_features, module.out_features

    def _get_base_layer_device_and_dtype(self, base_layer: QuantizedLinear) -> tuple[torch.device, torch.dtype]:
        return base_layer.device, base_layer.dtype


_QUANTIZED_LINEAR = (QuantizedLinear,)


def _matrix_of(layer: QuantizedLinear) -> StoredMatrix:
    return layer.stored_matrix
