"""Models in which some linear layers are stored in a format, in every available format."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_models import randomize_adapter, tiny_model
from torch import nn

from peft_moe_qlora import MoeQLoraConfig, quantize_experts
from peft_moe_qlora.quantization import Format, FourBitFormat
from peft_moe_qlora.quantization.formats import Fp8Format, Mxfp4Format
from peft_moe_qlora.quantized_linear import QuantizedLinear
from peft_moe_qlora.quantized_linear_lora import QuantizedLinearLora

FORMATS = [
    Fp8Format((16, 32)),
    Fp8Format((128, 128)),  # blocks are partial at both edges of all matrices here
    Fp8Format((1, 0)),
    Fp8Format((0, 0), "bf16"),
    Fp8Format((1, 32), "e8m0"),
    Mxfp4Format(),
    FourBitFormat(),
    FourBitFormat("fp4", 32),
    FourBitFormat("nf4", 64, double_quant=True),
]
FP8 = FORMATS[0]
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")

of_every_format = pytest.mark.parametrize("storage", FORMATS, ids=str)


def store_attention(model: nn.Module, storage: Format) -> nn.Module:
    for name, layer in list(model.named_modules()):
        if name.endswith(ATTENTION) and type(layer) is nn.Linear:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, QuantizedLinear.from_linear(layer, storage))
    return model


def stored_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}


def base_model(storage: Format = FP8, dtype=torch.float32, device: str = "cpu", **sizes) -> nn.Module:
    model = store_attention(tiny_model(device=device, dtype=dtype, attention_bias=True, **sizes), storage)
    assert len(stored_layers(model)) == 8
    return model


def adapted(model: nn.Module, **options) -> PeftModel:
    model = get_peft_model(model, MoeQLoraConfig(**{"r": 4, "target_modules": "all-linear", **options}))
    randomize_adapter(model, std=0.05)
    return model.eval()


def all_bytes(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if ".lora_" not in name}


def loras(model: nn.Module) -> Iterator[QuantizedLinearLora]:
    return (module for module in model.modules() if isinstance(module, QuantizedLinearLora))


def quantized(model: nn.Module) -> nn.Module:
    """With experts in the default format, as with an adapter."""
    quantize_experts(model, progressbar=False)
    return model
